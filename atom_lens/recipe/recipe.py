"""A recipe: everything that a study depends on, in one YAML file that is checked before anything is loaded."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import Field, create_model, model_validator

from atom_lens.activations.models import pick_device
from atom_lens.activations.positions import Positions
from atom_lens.activations.prompts import SOURCES
from atom_lens.activations.prompts.source import Source
from atom_lens.activations.prompts.standard_library import PythonDocs
from atom_lens.errors import AtomLensError
from atom_lens.recipe.sections import Atoms, Metric, Model, Split, Streaming, Training, Wandb
from atom_lens.storage.schema import Section

if TYPE_CHECKING:
    Prompts = Source
else:
    Prompts = Annotated[Union[tuple(dict.fromkeys(SOURCES.values()))], Field(discriminator="source")]  # noqa: UP007
_REQUIRED = ("model", "prompts", "hooks")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # it becomes a part of paths
T = TypeVar("T")


class Recipe(Section):
    """One study: model, prompts, hooks and positions, split, metric; atoms and training if it trains any.

    What only one study needs is a section that the study registers (`register_section`). `other_text` is text that
    edits should leave alone (`atom-lens intervene`) and, unless `domains` names others, the other distribution of
    `atom-lens shift`. Instead of a model and prompts a recipe may have `activations` of your own: a file (.npy, or
    .safetensors with a matrix for every hook) or a folder of sae-lens' cached activations.
    """

    name: Name
    model: Model = Model(name="unknown")
    prompts: Prompts | None = None
    activations: str | None = None
    hooks: list[str] = Field(["activations"], min_length=1)
    positions: Positions = "subject_last"
    massive_ratio: float | None = Field(10.0, gt=1)
    prepend_bos: bool = True
    max_tokens: int = Field(1024, ge=1)
    stream: Streaming | None = None
    split: Split = Split.model_validate({})
    metric: Metric = Metric()
    atoms: Atoms | None = None
    training: Training | None = None
    wandb: Wandb = Wandb()
    other_text: Prompts = PythonDocs(limit=300)

    @model_validator(mode="after")
    def _has_activations(self) -> Recipe:
        if self.activations is None:
            for key in _REQUIRED:
                if key not in self.model_fields_set or getattr(self, key) is None:
                    raise AtomLensError(f"key {key} is missing")
            if self.split.groups is not None:
                raise AtomLensError("key split.groups is given, it is allowed only with activations")
        elif self.prompts is not None or self.stream is not None:
            raise AtomLensError("key activations is given, it is allowed only without prompts and without stream")
        return self

    @model_validator(mode="after")
    def _streams_read_all(self) -> Recipe:
        if self.stream is not None and self.positions != "all":
            raise AtomLensError(f"key positions is {self.positions!r}, allowed is 'all' in a recipe with stream")
        return self

    def source(self, command: str) -> Source:
        """The prompts, for commands that need the texts that a model reads.

        Raises:
            AtomLensError: the recipe has activations instead.
        """
        if self.prompts is None:
            raise AtomLensError(f"recipe {self.name!r} has activations, {command} needs a model and prompts")
        return self.prompts

    def section(self, kind: type[T] | Any) -> T:
        """The section that a study registered as `kind`.

        Raises:
            AtomLensError: the recipe lacks it, and it has no default.
        """
        name, default = next((name, default) for name, (one, default) in _SECTIONS.items() if one == kind)
        found: Any = getattr(self, name, default)
        if found is None:
            raise AtomLensError(f"key {name} is missing in recipe {self.name!r}, {name} needs it")
        return found

    def to_train(self, command: str) -> tuple[Atoms, Training]:
        """The sections that training needs, checked before any work.

        Only commands call this: a recipe may be read on a machine without its device, and may lack these sections.

        Raises:
            AtomLensError: a section is missing, or a device is not available.
        """
        for name in ("atoms", "training"):
            if getattr(self, name) is None:
                raise AtomLensError(f"key {name} is missing in recipe {self.name!r}, {command} needs it")
        assert self.atoms is not None and self.training is not None
        for device in (self.model.device, self.training.device):
            pick_device(device)
        return self.atoms, self.training


_SECTIONS: dict[str, tuple[Any, Section | dict[str, Any] | None]] = {}


def register_section(name: str, kind: Any, default: Section | dict[str, Any] | None = None) -> None:
    """Let recipes have a section `name`; without a `default`, only those that give it have it."""
    _SECTIONS[name] = kind, default


def recipe_type() -> type[Recipe]:
    """`Recipe` with the sections of all registered studies; the same type as long as these are the same."""
    return _with_sections(tuple(_SECTIONS))


@cache
def _with_sections(names: tuple[str, ...]) -> type[Recipe]:
    fields: dict[str, Any] = {
        name: (kind if default is not None else kind | None, default)
        for name, (kind, default) in ((name, _SECTIONS[name]) for name in names)
    }
    return create_model("Recipe", __base__=Recipe, **fields)
