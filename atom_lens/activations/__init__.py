"""From a model and prompts to activations: what to read, at which hooks and tokens, through which backend."""
