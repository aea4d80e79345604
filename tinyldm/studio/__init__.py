"""One page to learn, prompt and edit with. All that it keeps are the folders that train.py and sample.py write."""
