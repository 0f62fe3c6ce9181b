"""Compare neurons, stock SAEs, pretrained features and our atoms on the same activations and budget."""
