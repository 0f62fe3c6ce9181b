"""What a GPU gains: pairs of atoms, a harvest, a training and its report, each compared with the same machine's CPU.

    python benchmarks/gpu.py --json gpu.json

The model of the harvest has the shape of Gemma 3 270M and random weights, so that nothing has to be fetched; the rows
of the training are planted. Float32 throughout. For training steps: `training_step.py --device cuda --data planted`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training_step import activations
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from atom_lens import AtomicInnerProduct, evaluate, harvest, open_model, stability
from atom_lens.activations.backends import BackendName
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.fit import fit_one

WORDS = ["Paris", "Lyon", "New", "York", "San", "Francisco", "Rome", "Oslo", "is", "a", "city", "in", "the", "capital"]
HOOKS = "blocks.*.hook_resid_post"


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def pairs(sizes: list[int], device: str) -> dict[str, Any]:
    """`stability` of random atoms of width 640, the second of two runs; on the CPU the smallest only."""
    found: dict[str, Any] = {}
    for f in sizes:
        generator = torch.Generator().manual_seed(0)
        atoms = torch.nn.functional.normalize(torch.randn(f, 640, generator=generator), dim=1)
        l0 = torch.randint(1, 17, (20_000,), generator=generator)
        row: dict[str, Any] = {}
        results = []
        for place in (device, "cpu") if f == sizes[0] else (device,):
            here = atoms.to(place)
            stability(here, l0)
            row[f"{place}_s"], result = seconds(lambda here=here, l0=l0: stability(here, l0))
            results.append(result)
        row["pairs"] = results[0].pairs
        row["moved_pairs"] = max(int((one.below - results[0].below).abs().max()) for one in results)
        found[str(f)] = row
    return found


def random_model(folder: Path) -> None:
    """A model of the shape of Gemma 3 270M, and a tokenizer of a few words that puts BOS first."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[PAD]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    special = {"bos_token": "[BOS]", "pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)


def harvests(texts: int, device: str) -> dict[str, Any]:
    """All 18 layers at all tokens: kept in files, and of a loaded model in memory; and how far the CPU's are off."""
    draw = random.Random(0)
    prompts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(16, 64))) for _ in range(texts)]
    reading: dict[str, Any] = {"massive_ratio": None}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        random_model(Path(model))
        backend: BackendName
        for backend in ("transformer_lens", "nnsight"):

            def kept(n: int, place: str, name: str, backend: BackendName = backend) -> tuple[float, Any]:
                where: dict[str, Any] = {"device": place, "store": Path(folder) / f"{backend} {name}"}
                took, one = seconds(lambda: harvest(model, prompts[:n], HOOKS, "all", backend, **where, **reading))
                return sum(map(len, one.rows.values())) / took, one

            kept(64, device, "warm-up")
            row: dict[str, Any] = {"kept_per_s": kept(texts, device, "all")[0]}
            live = open_model(model, backend, device=device)
            took, one = seconds(lambda live=live: harvest(live, prompts, HOOKS, "all", **reading))
            row["in_memory_per_s"] = sum(map(len, one.rows.values())) / took
            row["cpu_kept_per_s"] = kept(texts // 10, "cpu", "some, on the CPU")[0]
            cpu, gpu = (kept(16, place, f"few, {place}")[1] for place in ("cpu", device))
            row["off_by"] = max(float(((cpu[h] - gpu[h]).norm(dim=1) / cpu[h].norm(dim=1)).max()) for h in cpu)
            found[backend] = row
    return found


def training(n: int, steps: int, device: str) -> dict[str, Any]:
    """A whole training of 2,560 atoms and its report; on the GPU twice, for the bits."""
    x, about = activations("planted", 640, n + 2000)
    heldout, x = x[:2000], x[2000:]
    aip = AtomicInnerProduct.estimate(x)

    def trained(place: str, steps: int, **options: Any) -> tuple[float, Any]:
        atoms, settings = Atoms(capacity=2560, target_l0=16, **options), Training(steps=steps, device=place)
        took, (tsae, _) = seconds(lambda: fit_one(x, aip, atoms, settings.model_copy(update={"batch_size": 1024})))
        return took, tsae

    trained(device, 20)
    first, again = trained(device, steps), trained(device, steps)
    found: dict[str, Any] = {"about": about, "same_bits": torch.equal(first[1].W_dec, again[1].W_dec)}
    for place, (took, tsae) in {device: again, "cpu": trained("cpu", steps)}.items():
        evaluated, report = seconds(lambda tsae=tsae: evaluate(tsae, x, heldout, aip))
        figures = {name: report["heldout"][name] for name in ("r2", "r2_aip", "q_star")}
        found[place] = {"train_s": took, "evaluate_s": evaluated, **figures}
    found["dense_train_s"] = trained(device, steps, step="dense")[0]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", default="16384,65536", help="numbers of atoms whose pairs are counted")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, Any] = {
        "pairs": pairs([int(f) for f in arguments.atoms.split(",")], arguments.device),
        "harvest": harvests(arguments.texts, arguments.device),
        "training": training(arguments.rows, arguments.steps, arguments.device),
    }
    print(json.dumps(measured, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
