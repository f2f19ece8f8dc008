"""Putting replacements in force and taking them back: globally, or in one model."""
