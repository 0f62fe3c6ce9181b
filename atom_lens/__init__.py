"""atom-lens: are these the real units of this model, and how would I know?

The way of an activation: prompts -> activations -> metric -> atoms -> evidence -> interventions -> sharing. Importing
this package registers the architecture ``aip_tsae`` with sae-lens.
"""

from atom_lens._version import __version__
from atom_lens.activations import Harvest, Prompt, harvest, open_model
from atom_lens.evidence import Stability, evaluate, faithfulness, stability
from atom_lens.geometry import AtomicInnerProduct, SecondMoment, angle_histogram
from atom_lens.interventions import Splice, splice
from atom_lens.sharing import Published, aip_converter, convert, load_atoms, publish
from atom_lens.training import Recipe, fit, load_recipe, train
from atom_lens.tsae import TSAE, TSAEConfig
from atom_lens.tsae_training import TSAETraining, TSAETrainingConfig

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
