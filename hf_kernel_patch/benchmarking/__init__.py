"""What each op gains in a model: speed and memory of training steps and decoding, in turns."""
