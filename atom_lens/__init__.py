"""atom-lens: are these the real units of this model, and how would I know?

The way of an activation: prompts -> activations -> metric -> atoms -> evidence -> interventions -> sharing. Importing
this package registers the architecture ``aip_tsae`` with sae-lens.
"""

from atom_lens._version import __version__
from atom_lens.activations.connect import open_model
from atom_lens.activations.harvest import Harvest, harvest
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries.load import aip_converter, load_atoms
from atom_lens.dictionaries.tsae.sae import TSAE, TSAEConfig
from atom_lens.dictionaries.tsae.training import TSAETraining, TSAETrainingConfig
from atom_lens.evidence.faithfulness import faithfulness
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.stability import Stability, stability
from atom_lens.geometry import AtomicInnerProduct, SecondMoment, angle_histogram
from atom_lens.interventions.splice import Splice, splice
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.sharing.convert import convert
from atom_lens.sharing.publish import Published, publish
from atom_lens.studies.train import train
from atom_lens.training.fit import fit

__all__ = [
    "TSAE",
    "AtomicInnerProduct",
    "Harvest",
    "Prompt",
    "Published",
    "Recipe",
    "SecondMoment",
    "Splice",
    "Stability",
    "TSAEConfig",
    "TSAETraining",
    "TSAETrainingConfig",
    "__version__",
    "aip_converter",
    "angle_histogram",
    "convert",
    "evaluate",
    "faithfulness",
    "fit",
    "harvest",
    "load_atoms",
    "load_recipe",
    "open_model",
    "publish",
    "splice",
    "stability",
    "train",
]
