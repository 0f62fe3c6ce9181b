"""intervene.json: what edits of codes do to facts, each number with its 95% interval over facts."""

from __future__ import annotations

from pydantic import Field

from atom_lens.evidence.results import L0, Interval
from atom_lens.storage.schema import Result
from atom_lens.studies.cells import Kept


class Mean(Result):
    """A mean over facts, or a ratio of two."""

    mean: float
    interval: Interval


class Swap(Result):
    """What an edit does to the answers of facts A whose partners are B."""

    flips: Mean = Field(description="share of answers flipped to B's")
    kept: Mean = Field(description="share of answers kept at A's")
    log_odds: Mean = Field(description="rise of the log-odds of B over A, nats")


class ClassMeans(Kept, Swap):
    """The strongest simple edit: the difference of the mean activations of both answers. It is told the answers."""


class Dose(Swap):
    """The swap at a fraction of its strength, or beyond it: x + dose (z_B - z_A) D."""

    dose: float
    of_ceiling: Mean | None = Field(None, description="flips as a share of those of the whole patch")
    null: Swap | None = Field(None, description="an equally large change towards a third subject's code")


class Ablation(Result):
    """A's answer without its k strongest atoms, by attribution or by activation, or with as many random changes."""

    rank: str
    k: int
    drop: Mean = Field(description="drop of ln p(A), nats")
    lost: Mean = Field(description="share of answers lost")


class HeldOut(Result):
    """The dictionary on held-out activations."""

    r2: float
    r2_aip: float
    q_star: float
    l0: L0


class Cell(Kept):
    """One dictionary."""

    name: str
    heldout: HeldOut
    swap: dict[str, Swap] = Field(description="by kind of edit, on facts about held-out subjects")
    train: dict[str, Swap] = Field(description="the same on subjects that it was trained on")
    of_ceiling: dict[str, Mean | None] = Field(description="flips as a share of those of the whole patch")
    doses: list[Dose]
    monotone: Mean | None = Field(description="share of facts whose log-odds rise with every dose from 0 to 1")
    ablate: list[Ablation]
    kl: dict[str, dict[str, Mean]] = Field(description="where -> installed edit -> KL of the next token, nats")


class Scan(Kept):
    """The ceiling of every hook on training facts, and the facts of both sides, as indices of prompts."""

    hook: str
    hooks: dict[str, Mean]
    facts: list[int]
    train_facts: list[int]


class Interventions(Result):
    """The content of intervene.json."""

    schema_version: int = 2
    name: str
    model: str
    hook: str
    n: int
    n_facts: int
    n_answers: int
    scan: dict[str, Mean]
    class_means: Swap
    cells: list[Cell] = Field(min_length=1)
    versions: dict[str, str]
