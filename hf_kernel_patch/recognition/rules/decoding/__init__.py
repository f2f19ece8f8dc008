"""Decoding a token from captured graphs, by the layer's own code."""
