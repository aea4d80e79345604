"""How good the tiny checkpoint, the tiny CLIP and a learned word are."""
