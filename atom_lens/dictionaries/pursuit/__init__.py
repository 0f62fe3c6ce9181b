"""Pursuit: codes of sparse dictionaries found one atom at a time."""
