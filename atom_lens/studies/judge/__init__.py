"""Judge whether the contexts of a latent have one thing in common, by labels and by a language model."""
