"""atom-lens: are these the real units of this model, and how would I know?

The path of an activation: prompts -> activations -> metric -> atoms -> evidence -> interventions -> sharing. Importing
this package registers its architectures with sae-lens; everything else is imported on first use.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atom_lens._version import __version__

if TYPE_CHECKING:
    from atom_lens.activations.connect import open_model
    from atom_lens.activations.harvest import Harvest, harvest
    from atom_lens.activations.prompts.prompt import Prompt
    from atom_lens.dictionaries.aip_topk import AIPTopKTraining, AIPTopKTrainingConfig
    from atom_lens.dictionaries.load import aip_converter, load_atoms
    from atom_lens.dictionaries.pursuit.sae import PursuitSAE, PursuitSAEConfig
    from atom_lens.dictionaries.pursuit.training import PursuitTraining, PursuitTrainingConfig
    from atom_lens.dictionaries.tsae.sae import TSAE, TSAEConfig
    from atom_lens.dictionaries.tsae.training import TSAETraining, TSAETrainingConfig
    from atom_lens.errors import AtomLensError
    from atom_lens.evidence.evaluator import AtomEvaluator
    from atom_lens.evidence.faithfulness import faithfulness
    from atom_lens.evidence.report import evaluate
    from atom_lens.evidence.stability import Stability, stability
    from atom_lens.geometry import AtomicInnerProduct, SecondMoment, angle_histogram
    from atom_lens.interventions.splice import Splice, splice
    from atom_lens.recipe.reading import load_recipe
    from atom_lens.recipe.recipe import Recipe
    from atom_lens.sharing.convert import convert
    from atom_lens.sharing.publish import Published, publish
    from atom_lens.studies.audit.run import audit
    from atom_lens.studies.fit import Fitted, fit
    from atom_lens.studies.train.run import train

# Where each name is defined.
_HOME = {
    "activations.connect": ("open_model",),
    "activations.harvest": ("Harvest", "harvest"),
    "activations.prompts.prompt": ("Prompt",),
    "dictionaries.aip_topk": ("AIPTopKTraining", "AIPTopKTrainingConfig"),
    "dictionaries.pursuit.sae": ("PursuitSAE", "PursuitSAEConfig"),
    "dictionaries.pursuit.training": ("PursuitTraining", "PursuitTrainingConfig"),
    "dictionaries.load": ("aip_converter", "load_atoms"),
    "dictionaries.tsae.sae": ("TSAE", "TSAEConfig"),
    "dictionaries.tsae.training": ("TSAETraining", "TSAETrainingConfig"),
    "errors": ("AtomLensError",),
    "evidence.evaluator": ("AtomEvaluator",),
    "evidence.faithfulness": ("faithfulness",),
    "evidence.report": ("evaluate",),
    "evidence.stability": ("Stability", "stability"),
    "geometry": ("AtomicInnerProduct", "SecondMoment", "angle_histogram"),
    "interventions.splice": ("Splice", "splice"),
    "recipe.reading": ("load_recipe",),
    "recipe.recipe": ("Recipe",),
    "sharing.convert": ("convert",),
    "sharing.publish": ("Published", "publish"),
    "studies.audit.run": ("audit",),
    "studies.fit": ("Fitted", "fit"),
    "studies.train.run": ("train",),
}
_MODULE = {name: f"{__name__}.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "TSAE",
    "AIPTopKTraining",
    "AIPTopKTrainingConfig",
    "AtomEvaluator",
    "AtomLensError",
    "AtomicInnerProduct",
    "Fitted",
    "Harvest",
    "Prompt",
    "Published",
    "PursuitSAE",
    "PursuitSAEConfig",
    "PursuitTraining",
    "PursuitTrainingConfig",
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
    "audit",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Recipe", "audit", "load_recipe"):
        import_module(f"{__name__}.studies")  # each study adds its section to recipes
    value = globals()[name] = getattr(import_module(_MODULE[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__


# Not in the command line, which imports only what each command needs: its --help would take as long as sae-lens.
if sys.argv[:1] != ["-m"] and Path(sys.argv[0] if sys.argv else "").name != "atom-lens":
    import_module(f"{__name__}.dictionaries.tsae.training")
