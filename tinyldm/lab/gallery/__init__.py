"""What a learned word is good for: section 4 of the paper on the tiny checkpoint, with pictures and figures."""
