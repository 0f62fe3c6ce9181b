"""Loading atoms from folders and the Hub, and publishing them there."""

from atom_lens.sharing.load import aip_converter, atoms_folder, load_atoms
from atom_lens.sharing.publish import Published, publish

__all__ = ["Published", "aip_converter", "atoms_folder", "load_atoms", "publish"]
