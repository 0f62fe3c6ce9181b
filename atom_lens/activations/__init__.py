"""What to read (prompts, positions), from where (one file per backend), kept how (store)."""

from atom_lens.activations.connect import open_model
from atom_lens.activations.harvest import Harvest, harvest
from atom_lens.activations.prompts import Prompt

__all__ = ["Harvest", "Prompt", "harvest", "open_model"]
