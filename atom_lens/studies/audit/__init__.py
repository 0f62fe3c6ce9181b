"""Audit: the evidence about anybody's dictionary, on text that is held out, with nulls under the same encoder."""
