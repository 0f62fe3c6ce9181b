"""Sections of a recipe: the model, the split, the metric, the dictionaries and their training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from atom_lens.activations.backends import BackendName
from atom_lens.errors import AtomLensError
from atom_lens.geometry import DEFAULT_RIDGE
from atom_lens.storage.schema import Section, Seed


class Model(Section):
    """The language model. `name`: Hub id, local folder, .gguf file, or demo:gemma-3-270m."""

    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    backend: BackendName = "auto"


class Split(Section):
    """Held-out and validation data. No subject, and no document of running text, is on two sides.

    `validation` is a share of the subjects that are not held out: nothing is trained on them. Thresholds of pursuits
    are set there, and learning rates are chosen there. `groups` is a text file with the subject or document of every
    row of given activations, a line each; without it each row, or cached context, is its own subject.
    """

    groups: str | None = None
    heldout: float = Field(0.2, gt=0, lt=1)
    validation: float = Field(0.0, ge=0, lt=1)
    seed: Seed = 0


class Streaming(Section):
    """Running text: the prompts are documents, and a model reads all their tokens while dictionaries are trained.

    The first `metric_tokens` of the training documents are kept on disk, like the activations of any other recipe, and
    so are `heldout_tokens` of the documents that are held out. Metric and first atoms are taken from them, reports are
    measured on them, and studies that train many dictionaries train on them; every pass of `train` begins with them.
    What it reads after them is not stored: it passes through a buffer of `buffer_size` activations of each hook in
    memory.
    """

    context_size: int = Field(128, ge=2)
    metric_tokens: int = Field(1_000_000, ge=1)
    heldout_tokens: int = Field(65_536, ge=2)
    buffer_size: int = Field(65_536, ge=2)


class Metric(Section):
    """The atomic inner product. `ridge` is relative to the mean eigenvalue, or "oas"."""

    ridge: Annotated[float, Field(ge=0)] | Literal["oas"] = DEFAULT_RIDGE


Architecture = Literal["aip_tsae", "aip_topk", "aip_pursuit"]
Also = Literal["tsae_free", "tsae_tied", "aip_topk", "aip_pursuit"]


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "atom-lens"


class Pursuit(Section):
    """Settings of pursuit dictionaries and of TopK in the AIP.

    `norm` is alpha: 0 is the AIP, 1 Euclidean. `amortised` is the share of the steps with a TopK encoder, before those
    under the pursuit; a code has at most `cap` times the L0 asked for. `coherence_coefficient` weights the mean over
    atoms of the sum of their squared coherences with the others, relative to a share of variance: more raises q*. With
    `distilled` a plain TopK SAE that finds the atoms of a trained pursuit in one product is trained after it, and kept
    in its folder.
    """

    norm: float = Field(0.0, ge=0, le=1)
    amortised: float = Field(0.3, ge=0, le=1)
    cap: float = Field(2.0, ge=1)
    prune: bool = False
    coherence_coefficient: float = Field(0.0, ge=0)
    distilled: bool = False
    start: Literal["data", "random"] = "random"
    noise: float = Field(0.0, ge=0)


class Atoms(Section):
    """The dictionary, and the settings of a TSAE: the only place for its defaults and limits.

    The settings of pursuits and of TopK in the AIP are in `pursuit`.
    """

    architecture: Architecture = "aip_tsae"
    capacity: int = Field(ge=1, description="d_sae")
    target_l0: float = Field(gt=0, description="number of active atoms to aim for, for every activation")
    encoder: Literal["tied", "free"] = Field(
        "free", description="tied keeps W_enc = D S as in the identifiability theorem, free learns it"
    )
    start: Literal["data", "random"] = Field(
        "data", description="first atoms: centred training activations, or directions uniform under the metric"
    )
    loss_norm: float = Field(
        0.75,
        ge=0,
        le=1,
        description="the residual is weighted by the eigenvalues of C to this power: 0 is the AIP norm, 1 Euclidean",
    )
    l0_coefficient: float = Field(
        0.15, gt=0, description="weight of 2 (K - target_l0)^2 / target_l0, relative to a share of variance"
    )
    noise: float = Field(
        0.3,
        ge=0,
        description="expected square norm of the Gaussian noise on the encoder's input in training, as a share of the "
        "activation's; it keeps thresholds and codes valid on unseen activations",
    )
    revival: float = Field(
        1 / 32, ge=0, description="weight of the loss in which dead atoms explain what the living ones leave over"
    )
    bandwidth: float = Field(
        0.05, gt=0, description="width of the straight-through window, in norms of a whitened activation"
    )
    step: Literal["dense", "sparse"] = Field(
        "sparse",
        description="sparse visits only active entries and those in the window: the same up to rounding, and faster "
        "while few are active; the SAE's forward hooks then do not fire, and codes are sparse tensors",
    )
    encoder_product: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of sparse steps: bfloat16 searches entries in that precision, missing none, and computes the ones "
        "found in the precision of the weights",
    )
    pursuit: Pursuit = Pursuit.model_validate({})

    @model_validator(mode="after")
    def _target_fits(self) -> Atoms:
        if self.target_l0 > self.capacity:
            raise AtomLensError(f"atoms.target_l0 is {self.target_l0}, allowed is up to atoms.capacity={self.capacity}")
        return self


class Training(Section):
    """sae-lens' trainer. Steps, not epochs; the learning rate warms up and decays to zero linearly."""

    steps: int = Field(ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(1e-3, gt=0)
    warm_up: float = Field(0.05, ge=0, le=1)
    decay: float = Field(0.3, ge=0, le=1)
    dead_after: int = Field(200, ge=1, description="steps without firing after which an atom counts as dead")
    device: str = "auto"
    seed: Seed = 0
    seeds: int = Field(1, ge=1, description="runs from independent starts, trained in one pass")
    checkpoint_minutes: float = Field(5.0, ge=0, description="between checkpoints, from which a stopped run resumes")
    nulls: bool = Field(True, description="also train the frozen-decoder and the shuffled-coordinates null")
    also: list[Also] = Field([], description="other kinds, trained in the same pass and shown in the same table")

    @model_validator(mode="after")
    def _schedule_fits(self) -> Training:
        if self.warm_up + self.decay > 1 + 1e-9:  # 0.9 and 0.1 add up to 1, whatever floats say
            raise AtomLensError(
                f"training.warm_up is {self.warm_up:g} and training.decay {self.decay:g}, allowed is up to 1 together"
            )
        return self
