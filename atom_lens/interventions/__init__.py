"""Edits of codes, spliced into live models, and whether they do what they say."""
