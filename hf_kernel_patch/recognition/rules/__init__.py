"""Code inside of larger functions that is known, and what takes its place."""
