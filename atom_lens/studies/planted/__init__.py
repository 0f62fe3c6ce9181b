"""Planted: the theorem put to the test, and trained dictionaries marked against atoms that are known."""
