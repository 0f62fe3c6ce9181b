"""sae-lens' LanguageModelSAETrainingRunner and its command line train our architectures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETransformerBridge,
    TrainingSAE,
)
from support.architectures import PLAIN, config_of
from support.live import HOOK
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from atom_lens import (
    load_atoms,
)
from atom_lens.dictionaries.learning import Learning

# As docs/training.md has it.
COMMAND = "import runpy, atom_lens; runpy.run_module('sae_lens.llm_sae_training_runner', run_name='__main__')"


def texts(n: int = 400) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    return Dataset.from_dict({"tokens": torch.randint(3, 50, (n, 16), generator=generator).tolist()})


def runner(
    folder: Path, steps: int = 12, hook: str = HOOK, architecture: str = "aip_tsae", **options: Any
) -> LanguageModelSAERunnerConfig[Any]:
    more = {"amortised_steps": 4} if architecture == "aip_pursuit" else {}
    return LanguageModelSAERunnerConfig(
        sae=config_of(architecture, 2, d_in=16, d_sae=32, first_activations=300, **more),
        model_name="tiny",
        hook_name=hook,
        dataset_path="texts",
        is_dataset_tokenized=True,
        context_size=16,
        prepend_bos=False,
        training_tokens=steps * 128,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        streaming=False,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(folder / "atoms"),
        checkpoint_path=str(folder / "checkpoints"),
        verbose=False,
        **options,
    )


def hooked() -> HookedSAETransformer:
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=210, act_fn="relu", seed=0
    )
    return HookedSAETransformer(config)


def bridge(tiny: str) -> SAETransformerBridge:
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    made = SAETransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=AutoTokenizer.from_pretrained(tiny), device="cpu"
    )
    made.enable_compatibility_mode(no_processing=True)
    return made


@pytest.mark.parametrize(
    ("architecture", "kind", "hook"),
    [
        ("aip_tsae", "hooked", HOOK),
        ("aip_tsae", "bridge", HOOK),
        ("aip_tsae", "hooked", "blocks.1.attn.hook_z"),
        ("aip_topk", "hooked", "blocks.1.attn.hook_z"),
        ("aip_pursuit", "bridge", HOOK),
        ("aip_pursuit", "hooked", "blocks.1.attn.hook_z"),
    ],
)
def test_the_runner_leaves_atoms(architecture: str, kind: str, hook: str, tiny: str, tmp_path: Path) -> None:
    model: Any = hooked() if kind == "hooked" else bridge(tiny)
    run = LanguageModelSAETrainingRunner(runner(tmp_path, hook=hook, architecture=architecture), texts(), model)
    trained = run.run()
    atoms, x = load_atoms(tmp_path / "atoms"), run.activations_store.next_batch().squeeze(1)
    assert atoms.aip.n == 300 and atoms.aip.source == "first 300 activations of texts"
    assert atoms.cfg.metadata.hook_name == hook and atoms.cfg.metadata.model_from_pretrained_kwargs == {}
    assert float((atoms(x) - trained.eval()(x)).norm() / x.norm()) < 1e-3
    assert (tmp_path / "atoms" / "sparsity.safetensors").exists()
    torch.save(x, tmp_path / "x.pt")
    torch.save(atoms(x), tmp_path / "out.pt")
    script = (
        f"import sys, torch{', atom_lens' if architecture == 'aip_pursuit' else ''}; from sae_lens import SAE\n"
        f"sae = SAE.load_from_disk({str(tmp_path / 'atoms')!r})\n"
        f"x, out = torch.load({str(tmp_path / 'x.pt')!r}), torch.load({str(tmp_path / 'out.pt')!r})\n"
        f"assert type(sae).__name__ == {PLAIN[architecture]!r}, type(sae)\n"
        f"assert ('atom_lens' in sys.modules) is {architecture == 'aip_pursuit'}\n"
        "if sae.cfg.reshape_activations == 'hook_z': x, out = x.unflatten(-1, (2, 8)), out.unflatten(-1, (2, 8))\n"
        "torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("architecture", ["aip_tsae", "aip_pursuit"])
def test_the_runner_goes_on_from_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    """With the metric and the start that it had; such a checkpoint is no dictionary."""
    config = runner(tmp_path, n_checkpoints=1, architecture=architecture)
    LanguageModelSAETrainingRunner(config, texts(), hooked()).run()
    (checkpoint,) = Path(str(config.checkpoint_path)).iterdir()
    with pytest.raises(ValueError, match="checkpoint from the middle of training"):
        SAE.load_from_disk(checkpoint)
    saved = TrainingSAE.load_from_disk(checkpoint)
    again = runner(tmp_path / "again", resume_from_checkpoint=str(checkpoint), architecture=architecture)
    resumed = LanguageModelSAETrainingRunner(again, texts(), hooked())
    assert isinstance(saved, Learning) and saved.aip is not None
    resumed.run()
    atoms = load_atoms(tmp_path / "again" / "atoms")
    assert torch.equal(atoms.aip.metric, saved.aip.metric) and atoms.aip.source == saved.aip.source
    assert not torch.equal(atoms.W_dec, saved.finish().W_dec), "it has gone on"


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("aip_tsae", {"target_l0": 2.0, "noise": 0.1}),
        pytest.param("aip_topk", {"k": 2, "noise": 0.1}, marks=pytest.mark.slow),
        pytest.param("aip_pursuit", {"k": 2, "norm": 0.25}, marks=pytest.mark.slow),
    ],
)
def test_the_command_line(architecture: str, own: dict[str, float], tiny: str, tmp_path: Path) -> None:
    """sae-lens' own, in a process of its own: a local model by name, a local data set."""
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "gpt2")
    size: dict[str, Any] = {"vocab_size": 210, "n_positions": 64, "n_ctx": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "texts").mkdir()
    words = Dataset.from_dict({"text": ["Paris is a city in the capital of France Rome Oslo Lyon"] * 400})
    words.to_parquet(tmp_path / "texts" / "train.parquet")
    options = {
        "architecture": architecture,
        "d_in": 16,
        "d_sae": 32,
        **own,
        "first_activations": 300,
        "model_name": "gpt2",
        "hook_name": HOOK,
        "dataset_path": "texts",
        "context_size": 16,
        "training_tokens": 1280,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "device": "cpu",
        "log_to_wandb": False,
        "output_path": "atoms",
    }
    command = [
        sys.executable,
        "-c",
        COMMAND,
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    atoms = load_atoms(tmp_path / "atoms")
    assert atoms.aip.n == 300 and atoms.cfg.architecture() == architecture
