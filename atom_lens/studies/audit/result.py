"""audit.json: dictionaries measured on the same held-out activations, under several encoders, with nulls."""

from __future__ import annotations

from pydantic import Field

from atom_lens.evidence.results import Figures, IdentityFigures, Loss, MetricAbout
from atom_lens.storage.schema import Result


class Measured(Result):
    """A dictionary under one encoder, held-out."""

    figures: Figures
    loss: Loss | None = Field(default=None, description="None without a model, for a refit and for random directions")


class Audited(Result):
    """A dictionary, and what as many atoms that have learned nothing reach under the same pursuit."""

    name: str
    architecture: str
    d_sae: int
    train: Figures = Field(description="under its own encoder, on the activations that the metric is estimated on")
    own: Measured = Field(description="under its own encoder")
    refit: Measured | None = Field(
        default=None, description="the atoms that it chose, with coefficients by least squares under the metric"
    )
    pursued: Measured | None = Field(
        default=None, description="its atoms under a threshold-activated pursuit in the AIP, at its mean L0"
    )
    nulls: dict[str, Measured] = Field(
        default={},
        description="as many random directions and data points under the same pursuit at the same L0, and under one "
        "in the Euclidean norm, so that each is shown at its best in either R²",
    )
    why: str = Field(default="", description="why refit, pursuit and nulls are left out")


class Agreement(Result):
    """Two dictionaries matched one to one under the metric."""

    names: list[str] = Field(min_length=2, max_length=2)
    figures: IdentityFigures


class Audit(Result):
    """The content of audit.json."""

    schema_version: int = 1
    model: str | None
    hook: str | None
    text: str = Field(description="where the activations come from")
    n: int = Field(description="activations that the metric, the thresholds and the data null are taken from")
    n_heldout: int = Field(description="held-out activations; no document is in both")
    metric: MetricAbout
    dictionaries: list[Audited] = Field(min_length=1)
    agreement: list[Agreement] = []
    seconds: float
    versions: dict[str, str]
