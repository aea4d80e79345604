"""Section 5 of the paper (arXiv 2208.01618) in the tiny world: ways to learn a word, compared on many concepts."""
