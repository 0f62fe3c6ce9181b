"""Judging: do the contexts of a unit have one thing in common? Labels say, and a language model that sees no names."""

from atom_lens.judging.study import judge
from atom_lens.judging.tables import judge_table

__all__ = ["judge", "judge_table"]
