"""Evidence: pure functions on tensors, and the nulls that their results are compared with."""
