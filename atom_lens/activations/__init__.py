"""What to read (prompts, positions), from where (one file per backend), kept how (store)."""

from atom_lens.activations.harvest import Harvest, harvest
from atom_lens.activations.prompts import Prompt

__all__ = ["Harvest", "Prompt", "harvest"]
