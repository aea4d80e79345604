"""How others store the same things: their files read without trust, their names as tables."""
