"""What an atoms folder may hold (docs/format.md): everything is checked before anything is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from safetensors import safe_open
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.storage.files import read_json, regular_file, shown
from atom_lens.storage.schema import Strict, parsed
from atom_lens.storage.sealed import verify

AIP_FILENAME = "aip.safetensors"
ATOMS_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, AIP_FILENAME)
# Folders within one of atoms begin with these: of other seeds, of other kinds, of a pursuit distilled into one matrix.
WITHIN = SEED, ALSO, DISTILLED = "seed-", "also-", "distilled"
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class _Metric(Strict):
    n: int = Field(ge=0)
    ridge: float = Field(ge=0, strict=False)
    source: str


class AtomsConfig(Strict):
    """cfg.json of an atoms folder. sae-lens would accept other values and then compute something else.

    Attributes:
        ours: the architecture that such a folder has once it is loaded with its metric.
        tensors: name -> shape of the weights other than `W_dec` and `b_dec`, d for d_in and f for d_sae.
    """

    ours: ClassVar[str]
    tensors: ClassVar[dict[str, str]]

    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    device: str
    apply_b_dec_to_input: bool
    normalize_activations: Literal["none"]
    reshape_activations: Literal["none", "hook_z"]
    metadata: dict[str, Any]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor of the weights."""
        sizes = {"d": self.d_in, "f": self.d_sae}
        every = {"W_dec": "fd", "b_dec": "d", **self.tensors}
        return {name: [sizes[axis] for axis in shape] for name, shape in every.items()}

    @field_validator("metadata")
    @classmethod
    def _harmless(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        check_metadata(metadata)
        if metadata.get("model_from_pretrained_kwargs"):
            raise AtomLensError("metadata.model_from_pretrained_kwargs would be handed to whatever loads the model")
        version = str(metadata.get("sae_lens_version"))
        if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < 6:
            raise AtomLensError(f"metadata.sae_lens_version is {shown(version)}, allowed are versions from 6 on")
        for key in ("model_name", "hook_name"):
            if not isinstance(metadata.get(key), str | None):
                raise AtomLensError(f"metadata.{key} is {shown(metadata[key])}, allowed is a text")
        try:
            _Metric.model_validate(metadata.get("aip"))
        except ValueError:
            raise AtomLensError("metadata.aip says n, ridge and source of the metric, and nothing else") from None
        return metadata


# By the architecture that cfg.json names; the file of each of our architectures adds its own.
CONFIGS: dict[str, type[AtomsConfig]] = {}


def check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse keys that would replace a method: sae-lens sets each as an attribute of its `SAEMetadata`."""
    for key in metadata:
        if not key.isidentifier() or key.startswith("_") or key in dir(SAEMetadata):
            raise AtomLensError(f"metadata.{shown(key)} would replace a part of sae-lens' own object")


def read_atoms(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], AtomicInnerProduct]:
    """cfg.json, the weights and the metric of an atoms folder, as they were written and as docs/format.md asks.

    Raises:
        FileNotFoundError: a file is missing.
        AtomLensError: a file is damaged or holds what it must not; nothing of it was used.
    """
    verify(folder, ATOMS_FILES)
    return check_atoms(folder)


def check_atoms(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], AtomicInnerProduct]:
    """`read_atoms` without a check of the manifest."""
    cfg = read_json(folder / SAE_CFG_FILENAME, limit=1 << 20)
    architecture = cfg.get("architecture") if isinstance(cfg, dict) else None
    kind = CONFIGS.get(architecture) if isinstance(architecture, str) else None
    if kind is None:
        raise AtomLensError(
            f"{str(folder / SAE_CFG_FILENAME)!r}: architecture is {shown(repr(architecture))}, "
            f"allowed are {', '.join(CONFIGS)}"
        )
    checked = parsed(kind, cfg, folder / SAE_CFG_FILENAME)
    if checked.reshape_activations == "hook_z" and not str(cfg["metadata"].get("hook_name")).endswith(".hook_z"):
        raise AtomLensError(f"{str(folder)!r}: reshape_activations is 'hook_z', allowed is 'none' at any other hook")
    aip = AtomicInnerProduct.load(folder / AIP_FILENAME)
    if aip.width != checked.d_in:
        raise AtomLensError(f"{str(folder)!r}: the metric has width {aip.width}, the weights have d_in {checked.d_in}")
    if cfg["metadata"]["aip"] != {"n": aip.n, "ridge": aip.ridge, "source": aip.source}:
        raise AtomLensError(
            f"{str(folder)!r}: metadata.aip in {SAE_CFG_FILENAME} is not what {AIP_FILENAME} says of itself"
        )
    weights = _weights(folder / SAE_WEIGHTS_FILENAME, checked)
    for name, value in (("aip_eigenvalues", aip.eigenvalues), ("aip_eigenvectors", aip.eigenvectors)):
        if name in weights and not torch.equal(weights[name], value):
            raise AtomLensError(f"{str(folder)!r}: {name} of the weights is not what {AIP_FILENAME} has")
    return cfg, weights, aip


def _weights(path: Path, cfg: AtomsConfig) -> dict[str, Tensor]:
    expected = cfg.shapes
    regular_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if sorted(found) != sorted(expected):
                raise AtomLensError(
                    f"it holds {shown(', '.join(sorted(found)))}, allowed are {', '.join(sorted(expected))}"
                )
            for name, shape in expected.items():
                dtype = "F64" if name.startswith("aip_") else _DTYPES[cfg.dtype]  # the metric is exact
                if found[name].get_shape() != shape or found[name].get_dtype() != dtype:
                    raise AtomLensError(
                        f"{name} is {found[name].get_dtype()} {found[name].get_shape()}, "
                        f"{dtype} {shape} is what {SAE_CFG_FILENAME} says"
                    )
            state = {name: file.get_tensor(name) for name in expected}
    except OSError:
        raise
    except Exception as error:  # safetensors has an error of its own for damaged headers
        raise AtomLensError(f"{str(path)!r} holds no atoms: {shown(str(error))}") from error
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise AtomLensError(f"{str(path)!r} holds no atoms: {name} has NaN or infinite values")
    return state
