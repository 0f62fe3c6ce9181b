"""compare.json: every cell of a comparison, and what kinds reach at the same L0."""

from __future__ import annotations

from pydantic import Field

from atom_lens.evidence.results import Figures, IdentityFigures, Loss, MetricAbout
from atom_lens.storage.schema import Result
from atom_lens.studies.cells import Kept


class Run(Result):
    """One dictionary on both splits; for a null, R² is that of a Euclidean pursuit."""

    train: Figures
    heldout: Figures
    refit: Figures | None = Field(
        default=None, description="held-out: the atoms that it chose, coefficients by least squares under the metric"
    )
    pursued: Figures | None = Field(
        default=None, description="held-out: its atoms under a threshold-activated pursuit in the AIP, at its mean L0"
    )
    loss: Loss | None = Field(
        default=None, description="of the model with it spliced in, with compare.loss_tokens; for a null the lower one"
    )


class Cell(Kept):
    """A kind at one sparsity, all seeds."""

    kind: str = Field(description="name of the kind, or of pretrained features")
    level: float | None = Field(description="the level asked for: K, a target L0 or an L1 weight; None for none")
    lr: float | None = Field(default=None, description="of its training; None if it is not trained here")
    runs: list[Run] = Field(min_length=1)
    identity: IdentityFigures | None = None


class Rate(Kept):
    """The learning rate of a kind at one hook, chosen on validation rows by `merit`."""

    lr: float
    validation: dict[str, float] = Field(description="R² + R² (AIP) on validation rows by learning rate, one seed")
    l0: dict[str, float] = Field(default={}, description="on validation rows by learning rate")


class Matched(Result):
    """What a kind reaches at a held-out L0, between two points of its sweep; no numbers if the sweep misses it."""

    l0: float
    kind: str
    between: list[float] | None = None
    r2: float | None = None
    r2_aip: float | None = None
    q_star: float | None = None
    train_r2: float | None = None
    pw_mcc: float | None = None
    recovered: float | None = None


class Hook(Result):
    """A comparison at one hook."""

    n: int
    n_heldout: int
    d_in: int
    d_sae: int
    n_over_f: float
    metric: MetricAbout
    cells: list[Cell] = Field(min_length=1)
    matched: list[Matched] = []


class Comparison(Result):
    """The content of compare.json."""

    schema_version: int = 2
    model: str
    hooks: dict[str, Hook] = Field(min_length=1)
    versions: dict[str, str]
