"""Kernels over rows of logits, one row after the other."""
