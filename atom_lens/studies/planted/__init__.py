"""Test the identifiability theorem, and score trained dictionaries against planted atoms."""
