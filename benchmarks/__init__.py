"""Measurements of every op and of whole models, against the peers that are installed."""
