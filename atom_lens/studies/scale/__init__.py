"""Measure how R² and q* depend on the numbers of activations and of atoms, in and out of sample."""
