"""The small procedural world that the tiny model lives in: captioned pictures with ground truth."""
