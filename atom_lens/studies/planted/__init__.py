"""Planted: test the theorem, and score trained dictionaries against known atoms."""
