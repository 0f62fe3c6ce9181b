"""Loading atoms from folders, the Hub and other libraries, writing them for others, and publishing them."""

from atom_lens.sharing.convert import convert
from atom_lens.sharing.load import aip_converter, atoms_folder, load_atoms
from atom_lens.sharing.publish import Published, publish

__all__ = ["Published", "aip_converter", "atoms_folder", "convert", "load_atoms", "publish"]
