"""What other tools meet: the Trainer of transformers. Each file is imported at its first use."""
