"""How the tiny checkpoint and the tiny CLIP were made."""
