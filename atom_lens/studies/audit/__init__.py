"""Audit: the evidence about anybody's dictionary, on held-out text, with nulls under the same encoder."""
