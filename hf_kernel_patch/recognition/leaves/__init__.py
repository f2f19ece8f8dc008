"""Whole functions that are known by their code, and what takes their place."""
