"""Measure whether edits of codes change the answers they should, and leave the rest alone."""
