"""Activations per second of a harvest, compared with sae-lens' ActivationsStore and with plain transformers loops.

    python benchmarks/harvest.py --json harvest.json

Part A reads the residual stream after every layer at all tokens of English paragraphs: one harvest, against sae-lens'
store with a pass for each layer, and against its store of several hooks. Part B reads one layer at the last token of
an entity in a prompt, against padded batches of 64 in the order given. All take turns in one process, medians over the
rounds, demo model, float32, CPU. Compare ratios, not seconds: on a busy machine one thread is steadier than several.

In favour of the others: sae-lens' stores get the same paragraphs already tokenised and packed without padding (so that
paragraphs see those before them), mix nothing, store nothing, and their BOS tokens count as activations.
A plain loop runs transformers' default attention, a harvest the eager one, with which its backends agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.config import PretokenizeRunnerConfig
from sae_lens.pretokenize_runner import pretokenize_dataset
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from atom_lens.activations.connect import open_model
from atom_lens.activations.harvest import Harvest, harvest
from atom_lens.activations.models import find_model
from atom_lens.activations.prompts.cities import Cities
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.standard_library import PythonDocs

MODEL, LAYER = "demo:gemma-3-270m", 9
CONTEXT, ROWS = 128, 32  # sae-lens' defaults: 4096 tokens in a pass
BATCH = 64  # prompts of a plain loop
OURS = {"A": "A atom_lens, all layers", "B": "B atom_lens, transformer_lens"}
REFERENCE = "B base model, forward hook"

# What a contestant gives: a harvest, the rows that it read, or only how many there were.
Output = Harvest | Tensor | int
Contestants = dict[str, Callable[[], Output]]


class _Stop(Exception):
    """Ends a forward pass at the layer read."""


def resid(layer: int | str) -> str:
    return f"blocks.{layer}.hook_resid_post"


def store_of(layer: int) -> str:
    return f"A sae-lens, layer {layer}"


def packed(bridge: Any, texts: list[str]) -> Dataset:
    """The texts as sae-lens expects them: tokenised, with BOS between them, in rows of the context's length."""
    config = PretokenizeRunnerConfig(
        context_size=CONTEXT, shuffle=False, num_proc=1, pretokenize_batch_size=len(texts), column_name="text"
    )
    return pretokenize_dataset(Dataset.from_dict({"text": texts}), bridge.tokenizer, config)


def read_store(bridge: Any, rows: Dataset, layers: list[int], several: bool) -> int:
    """Go once through a store of sae-lens over `rows`, in passes of one size; how many activations it gave."""
    passes = -(-len(rows) // ROWS)
    batch = len(rows) // passes
    settings: dict[str, Any] = {
        "model": bridge,
        "dataset": rows,
        "streaming": False,
        "context_size": CONTEXT,
        "n_batches_in_buffer": batch,
        "total_training_tokens": passes * batch * CONTEXT,
        "store_batch_size_prompts": batch,
        "train_batch_size_tokens": batch * CONTEXT,
        "prepend_bos": True,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
        "activations_mixing_fraction": 0.0,
    }
    widths: dict[str, int] = {resid(layer): bridge.cfg.d_model for layer in layers}
    if several:
        store = ActivationsStore.from_config_multi_hook(**settings, hook_names=list(widths), hook_d_ins=widths)
        batches = store.get_multi_hook_data_loader()
    else:
        hook, width = next(iter(widths.items()))
        batches = ActivationsStore(**settings, hook_name=hook, hook_head_index=None, d_in=width)
    given = 0
    for _ in range(passes):
        found = next(batches)
        given += sum(map(len, found.values())) if isinstance(found, dict) else len(found)
    return given


def part_a(bridge: Any, texts: list[Prompt], layers: list[int], reading: dict[str, Any]) -> Contestants:
    """All layers at all tokens; `layers` are those that sae-lens' store is run for one by one."""
    n, rows = bridge.cfg.n_layers, packed(bridge, [prompt.text for prompt in texts])
    made: Contestants = {
        OURS["A"]: partial(harvest, bridge, texts, resid("*"), "all", **reading),
        "A sae-lens, several hooks, all layers": partial(read_store, bridge, rows, list(range(n)), True),
        # Below the last layer the store stops there; at the last one it runs the unembedding too.
        "A sae-lens, several hooks, but the last": partial(read_store, bridge, rows, list(range(n - 1)), True),
    }
    return made | {store_of(layer): partial(read_store, bridge, rows, [layer], False) for layer in layers}


@torch.no_grad()
def plain_loop(model: Any, layers: Any, tokenizer: Any, prompts: list[Prompt], how: str) -> Tensor:
    """Activations after one of `layers` at the last token of each subject, as one writes it with transformers.

    `model` is a causal model or what it has below its head. `how` is "states" (the model's hidden states), a forward
    "hook" in a pass through the whole model, or "stop", a hook that ends the pass.
    """
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        if how == "stop":
            raise _Stop

    handle = None if how == "states" else layers[LAYER].register_forward_hook(keep)
    found = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        encoded = tokenizer([p.text for p in batch], padding=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")
        try:
            output = model(**encoded, output_hidden_states=how == "states")
            values = kept.pop() if handle else output.hidden_states[LAYER + 1]
        except _Stop:
            values = kept.pop()
        start, end = torch.tensor([p.span for p in batch]).T[:, :, None]
        inside = (offsets[..., 0] < end) & (offsets[..., 1] > start)
        last = inside.shape[1] - 1 - inside.flip(1).int().argmax(dim=1)
        found.append(values[torch.arange(len(batch)), last])
    if handle:
        handle.remove()
    return torch.cat(found)


def part_b(
    models: dict[str, Any], causal: Any, tokenizer: Any, prompts: list[Prompt], reading: dict[str, Any]
) -> Contestants:
    """One layer at one token of each prompt; `models` are ours, by backend."""
    ours = partial(harvest, prompts=prompts, hooks=resid(LAYER), positions="subject_last", **reading)
    loop = partial(plain_loop, layers=causal.model.layers, tokenizer=tokenizer, prompts=prompts)
    made: Contestants = {f"B atom_lens, {name}": partial(ours, model) for name, model in models.items()}
    made |= {f"B atom_lens, {name}, unique": partial(ours, model, unique=True) for name, model in models.items()}
    return made | {
        REFERENCE: partial(loop, causal.model, how="hook"),
        "B base model, forward hook that stops": partial(loop, causal.model, how="stop"),
        "B base model, hidden states": partial(loop, causal.model, how="states"),
        "B causal model, forward hook": partial(loop, causal, how="hook"),
        "B causal model, hidden states": partial(loop, causal, how="states"),
    }


def activations(output: Output) -> int:
    """How many rows were read, over all hooks."""
    if isinstance(output, Harvest):
        return sum(map(len, output.rows.values())) + sum(output.dropped.values())
    return output if isinstance(output, int) else len(output)


def difference(output: Harvest, reference: Tensor) -> float:
    """The largest relative difference of a row, over the rows that were harvested."""
    x, same = output[resid(LAYER)], reference[output.rows[resid(LAYER)][:, 0]]
    return float(((x - same).norm(dim=1) / same.norm(dim=1)).max())


def summary(times: list[tuple[float, float]], count: int) -> dict[str, Any]:
    """Of (wall, process) seconds."""
    wall, cpu = map(list, zip(*times, strict=True))
    middle = {"median_s": statistics.median(wall), "cpu_median_s": statistics.median(cpu)}
    spread = {"min_s": min(wall), "max_s": max(wall), "seconds": wall, "cpu_seconds": cpu}
    return {"activations": count, "activations_per_s": count / middle["median_s"], **middle, **spread}


def layer_by_layer(rows: dict[str, dict[str, Any]], n: int, layers: list[int]) -> dict[str, Any]:
    """sae-lens' store over all layers, by rounds: layers below the last take the mean of those that were run.

    The last one stands for itself, since its store alone runs the unembedding.
    """
    both = [list(zip(rows[store_of(i)]["seconds"], rows[store_of(i)]["cpu_seconds"], strict=True)) for i in layers]
    times = []
    for *below, (wall, cpu) in zip(*both, strict=True):
        means = [statistics.mean(seconds) for seconds in zip(*below, strict=True)]
        times.append(((n - 1) * means[0] + wall, (n - 1) * means[1] + cpu))
    return summary(times, n * rows[store_of(n - 1)]["activations"])


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The time of each contestant, after a short warm-up run of each."""
    models = {"transformer_lens": open_model(MODEL, device="cpu")}
    if arguments.backend == "nnsight":
        models["nnsight"] = open_model(MODEL, "nnsight", device="cpu")
    bridge, path = models["transformer_lens"], find_model(MODEL).path
    causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts, prompts = (
        PythonDocs(limit=arguments.texts).read(),
        Cities(template=arguments.template, limit=arguments.entities).read(),
    )
    reading = {"batch_tokens": arguments.batch_tokens} if arguments.batch_tokens else {}
    n = bridge.cfg.n_layers
    layers = list(range(n)) if arguments.all_layers else [0, (n - 2) // 2, n - 2, n - 1]

    def contestants(texts: list[Prompt], prompts: list[Prompt]) -> Contestants:
        a = part_a(bridge, texts, layers, reading) if texts else {}
        return a | (part_b(models, causal, tokenizer, prompts, reading) if prompts else {})

    for run in contestants(texts[:8], prompts[:8]).values():
        run()
    outputs: dict[str, Output] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for name, run in contestants(texts, prompts).items():
            outputs.pop(name, None)
            start = time.perf_counter(), time.process_time()
            outputs[name] = run()
            times.setdefault(name, []).append((time.perf_counter() - start[0], time.process_time() - start[1]))
    rows = {name: summary(taken, activations(outputs[name])) for name, taken in times.items()}
    if texts:
        rows[f"A sae-lens, layer by layer, from {len(layers)} of {n}"] = layer_by_layer(rows, n, layers)
    for name, row in rows.items():
        row["ours_is_times"] = rows[OURS[name[0]]]["activations_per_s"] / row["activations_per_s"]
        output, reference = outputs.get(name), outputs.get(REFERENCE)
        if name.startswith("B") and isinstance(output, Harvest) and isinstance(reference, Tensor):
            row["largest_relative_difference"] = difference(output, reference)
    return dict(sorted(rows.items(), key=lambda item: item[0][0]))


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':40} activations  median s      min      max    CPU s  per second  ours is"]
    for name, row in rows.items():
        seconds = "".join(f"{row[key]:9.2f}" for key in ("median_s", "min_s", "max_s", "cpu_median_s"))
        rate = f"{row['activations_per_s']:11,.0f} {row['ours_is_times']:7.2f} x"
        lines.append(f"{name:40} {row['activations']:11,} {seconds} {rate}")
    if OURS["A"] in rows:
        lines.append("A, layer by layer: layers that were not run take the mean of those below the last that were.")
    worst = [row["largest_relative_difference"] for row in rows.values() if "largest_relative_difference" in row]
    if worst:
        lines.append(f"B: our rows differ from the forward hook's by at most {max(worst):.1e} of their norm.")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200, help="paragraphs of part A; 0 leaves it out")
    parser.add_argument("--entities", type=int, default=512, help="prompts of part B; 0 leaves it out")
    parser.add_argument("--template", default="{} is a city in the country of", help="of the prompts of part B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="transformer_lens", choices=["transformer_lens", "nnsight"])
    parser.add_argument("--batch-tokens", type=int, help="of a harvest; its own default if not given")
    parser.add_argument("--all-layers", action="store_true", help="run sae-lens' store for every layer (slow)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # sae-lens' store warns of a small data set, and of a copy at every row
    results = measure(arguments)
    print(table(results))
    if arguments.json:
        packages = ("torch", "sae-lens", "transformer-lens", "transformers", "nnsight")
        about = {"versions": {name: version(name) for name in packages}, "arguments": vars(arguments)}
        arguments.json.write_text(json.dumps({**about, "rows": results}, indent=2, default=str) + "\n")
