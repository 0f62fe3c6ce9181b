"""Tokens per second of a training on running text, end to end, compared with sae-lens' own runner.

    python benchmarks/stream.py --text text.jsonl --json stream.json

Both read the same documents with the same model at the same layer, take the metric from the same number of first
activations, and train TopK in the AIP (`aip_topk`) on the next tokens in batches of 256; ours one dictionary, then six
from six seeds in one pass, and sae-lens' runner one. Loading the model, reading the text and saving count for both;
our report is measured on as few tokens as possible. They take turns in one process, medians over the rounds.
Compare ratios, the machine may be doing something else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

from atom_lens import AIPTopKTrainingConfig, open_model, train
from atom_lens.activations.models import find_model
from atom_lens.activations.prompts.files import JsonLines
from atom_lens.recipe.reading import check_recipe

MODEL, HOOK, WIDTH, CONTEXT, BATCH = "demo:gemma-3-270m", "blocks.9.hook_resid_post", 640, 128, 256
BUFFER = 16384  # activations mixed on either side


def ours(model: str, text: str, steps: int, metric: int, d_sae: int, k: int, seeds: int) -> None:
    """A recipe with a section `stream`, its activations kept nowhere that a later round could find them."""
    recipe = check_recipe(
        {
            "name": "stream",
            "model": {"name": model, "device": "cpu"},
            "prompts": {"source": "jsonl", "path": text},
            "hooks": [HOOK],
            "positions": "all",
            "split": {"heldout": 0.01},
            "stream": {"context_size": CONTEXT, "metric_tokens": metric, "heldout_tokens": 1024, "buffer_size": BUFFER},
            "atoms": {"architecture": "aip_topk", "capacity": d_sae, "target_l0": k},
            "training": {"steps": steps, "batch_size": BATCH, "seeds": seeds, "nulls": False, "device": "cpu"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATOM_LENS_CACHE"] = folder
        train(recipe, out=folder)


def theirs(model: str, text: str, steps: int, metric: int, d_sae: int, k: int) -> None:
    """sae-lens' runner with our architecture, which takes its metric from the first activations."""
    documents = Dataset.from_dict({"text": [one.text for one in JsonLines(path=text).read()]})
    config = LanguageModelSAERunnerConfig(
        sae=AIPTopKTrainingConfig(d_in=WIDTH, d_sae=d_sae, k=k, first_activations=metric),
        model_name=model,
        hook_name=HOOK,
        dataset_path="text",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=CONTEXT,
        training_tokens=steps * BATCH + metric,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=BUFFER // CONTEXT,
        lr=1e-3,
        device="cpu",
        output_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    LanguageModelSAETrainingRunner(config, documents, open_model(model, device="cpu")).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a JSON lines file with documents")
    parser.add_argument("--steps", type=int, default=200, help="of 256 tokens")
    parser.add_argument("--metric-tokens", type=int, default=20480)
    parser.add_argument("--d-sae", type=int, default=640)
    parser.add_argument("--l0", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = find_model(MODEL).path  # converted before the first round
    sizes = (model, given.text, given.steps, given.metric_tokens, given.d_sae, given.l0)
    contestants: dict[str, Callable[[], None]] = {
        "atom_lens, 1 dictionary": lambda: ours(*sizes, 1),
        "atom_lens, 6 dictionaries": lambda: ours(*sizes, 6),
        "sae-lens' runner, 1 dictionary": lambda: theirs(*sizes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(given.rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    tokens = given.steps * BATCH
    found = {name: {"seconds": times, "median": statistics.median(times)} for name, times in seconds.items()}
    for name, one in found.items():
        print(f"{name:32s} {one['median']:7.1f} s {tokens / one['median']:7.0f} trained tokens per second")
    if given.json:
        about = {
            "torch": version("torch"),
            "sae-lens": version("sae-lens"),
            "threads": torch.get_num_threads(),
            "d_sae": given.d_sae,
            "l0": given.l0,
            "steps": given.steps,
            "metric_tokens": given.metric_tokens,
        }
        given.json.write_text(json.dumps({"about": about, "runs": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
