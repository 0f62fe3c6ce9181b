"""Edits of codes, spliced into live models, and whether they have the effect they should."""
