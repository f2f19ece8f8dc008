"""The ops: one folder each, with a float32 reference and one file a backend."""
