"""The paper's studies and ours, each a recipe away."""
