"""Atoms on disk: loading what a run wrote."""

from atom_lens.sharing.load import aip_converter, load_atoms

__all__ = ["aip_converter", "load_atoms"]
