"""Judging: do the contexts of a latent have one thing in common?"""
