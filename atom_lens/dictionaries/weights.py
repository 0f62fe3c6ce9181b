"""JumpReLU weights, whatever the names, transposes and file formats they come in."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import regular_file, shown

State = dict[str, Tensor]
Thresholds = Literal["auto", "plain", "log"]
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".bin")

# Names that libraries give the same tensor; prefixes such as "sae." or "module." are dropped first.
_NAMES = {
    "W_enc": ("w_enc", "encoder.weight", "enc.weight", "encoder"),
    "W_dec": ("w_dec", "decoder.weight", "dec.weight", "decoder", "dictionary", "atoms"),
    "b_enc": ("b_enc", "encoder.bias", "enc.bias", "encoder_bias", "latent_bias"),
    "b_dec": ("b_dec", "decoder.bias", "dec.bias", "decoder_bias", "pre_bias", "bias"),
    "threshold": ("threshold", "thresholds", "theta", "jumprelu.threshold", "activation.threshold", "act.threshold"),
    "log_threshold": ("log_threshold", "log_thresholds", "log_theta", "jumprelu.log_threshold"),
}
_PREFIX = re.compile(r"^(?:(?:module|model|sae|tsae|autoencoder|ae|_orig_mod)\.)+")


def read_tensors(path: Path) -> State:
    """Tensors of a safetensors, npz or torch file, by name. Nothing in a torch file is executed."""
    size = regular_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as members:
                unpacked = sum(member.file_size for member in members.infolist())
            if unpacked > 20 * size + (1 << 20):  # weights hardly compress: this is a bomb
                raise AtomLensError(f"its {size} bytes unpack to {unpacked}")
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise AtomLensError(f"{str(path)!r} cannot be read: {shown(str(error))}") from error
    except Exception as error:  # torch's own UnpicklingError: what it refuses to execute
        raise AtomLensError(f"{str(path)!r} is refused: it holds something other than tensors and numbers") from error
    for _ in range(3):  # {"state_dict": {...}}: one mapping among settings
        if not isinstance(found, Mapping):
            break
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise AtomLensError(f"{str(path)!r}: tensor {shown(name)} is larger than what is stored of it")
        if tensors:
            return tensors
        inner = [value for value in found.values() if isinstance(value, Mapping)]
        found = inner[0] if len(inner) == 1 else None
    raise AtomLensError(f"{str(path)!r} holds no tensors by name")


def jumprelu_weights(
    found: Mapping[str, Tensor], path: Path, threshold: Thresholds = "auto", thresholds: bool = True
) -> State:
    """JumpReLU weights under sae-lens' names and in its shapes, whatever names and transposes they come in.

    Args:
        found: tensors by name.
        path: for messages.
        threshold: whether thresholds are plain or logarithms; "auto" decides by their name.
        thresholds: whether there must be any; without them `b_enc` and `b_dec` alone tell the widths apart.

    Raises:
        AtomLensError: a tensor is missing, unknown or given twice, shapes do not fit, or plain thresholds are negative.
    """
    what = shown(", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items()) or "nothing")
    made: dict[str, tuple[str, Tensor]] = {}
    for name, value in found.items():
        short = _PREFIX.sub("", name).lower()
        ours = next((ours for ours, names in _NAMES.items() if short in names), None)
        if ours is None or ours in made:
            known = "given twice" if ours else "unknown"
            raise AtomLensError(f"{str(path)!r}: tensor {shown(repr(name))} is {known}, found: {what}")
        if value.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise AtomLensError(
                f"{str(path)!r}: {name} is {value.dtype}, allowed are float64, float32, bfloat16, float16"
            )
        made[ours] = (name, value if ours.startswith("W_") else value.flatten())
    log = made.pop("log_threshold", None)
    if log is not None and "threshold" not in made:
        made["threshold"] = log
        threshold = "log" if threshold == "auto" else threshold
    needed = ["W_enc", "W_dec", *(["threshold"] if thresholds else [])]
    missing = [name for name in needed if name not in made]
    if missing:
        raise AtomLensError(f"{str(path)!r}: no {' and no '.join(missing)}, found: {what}")
    d, f = _widths(made, path, what)
    w_dec = made["W_dec"][1]
    state = {
        "W_enc": _turned(*made["W_enc"], (d, f)),
        "W_dec": _turned(*made["W_dec"], (f, d)),
        "b_enc": made["b_enc"][1] if "b_enc" in made else w_dec.new_zeros(f),
        "b_dec": made["b_dec"][1] if "b_dec" in made else w_dec.new_zeros(d),
    }
    if thresholds:
        value = made["threshold"][1]
        value = value.exp() if threshold == "log" else value
        if (value < 0).any() and threshold == "auto":
            raise AtomLensError(f"{str(path)!r}: thresholds are negative, say threshold='log' or threshold='plain'")
        state["threshold"] = value.expand(f)
    dtype = w_dec.dtype
    return {name: value.to(dtype).contiguous() for name, value in state.items()}


def _widths(made: Mapping[str, tuple[str, Tensor]], path: Path, what: str) -> tuple[int, int]:
    """d_in and d_sae. Matrices have them in either order: the length of a vector tells which is which."""
    shapes = [tuple(made[name][1].shape) for name in ("W_enc", "W_dec")]
    lengths = {name: value.numel() for name, (_, value) in made.items() if name not in ("W_enc", "W_dec")}
    sizes = set(shapes[0]) | set(shapes[1])

    def other(size: int) -> int:
        return next(iter(sizes - {size}), size)

    atoms = {length for name, length in lengths.items() if name != "b_dec" and (name, length) != ("threshold", 1)}
    width = {lengths["b_dec"]} if "b_dec" in lengths else {other(size) for size in atoms}
    atoms = atoms or {other(size) for size in width}
    d, f = next(iter(width), 0), next(iter(atoms), 0)
    if len(atoms) != 1 or len(width) != 1 or any(sorted(shape) != sorted((d, f)) for shape in shapes):
        raise AtomLensError(f"{str(path)!r}: shapes do not tell width from number of atoms, found: {what}")
    return d, f


def _turned(name: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    # A square matrix does not show its order; torch's Linear keeps (out, in).
    if tuple(value.shape) == shape and not (shape[0] == shape[1] and name.lower().endswith(".weight")):
        return value
    return value.T
