"""Pursuit: sparse codes found one atom at a time."""
