"""One page to learn, prompt and edit with. All that it keeps is what train.py, sample.py and it write into outputs/."""
