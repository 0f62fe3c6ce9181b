"""Train atoms on a model's activations, and measure them against nulls."""
