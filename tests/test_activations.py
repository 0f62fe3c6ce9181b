"""Harvest: what is read, where, and that both backends read the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from atom_lens import Prompt, harvest
from atom_lens.activations.connect import open_backend
from atom_lens.activations.hooks import expand_hooks
from atom_lens.activations.models import find_model

PROMPTS = [
    Prompt.fill("{} is a city in", "San Francisco", "the"),
    Prompt.fill("the capital of {} is", "France"),
    Prompt("Rome", "Rome"),
    Prompt.fill("{} is a city in the capital of Italy", "Oslo"),
]
HOOKS = ["blocks.*.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"]


@pytest.fixture(scope="module")
def reference(tiny: str) -> dict[str, torch.Tensor]:
    """Plain transformers with plain torch hooks, one prompt at a time: no padding, no early stop, no library."""
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    kept: dict[str, list[torch.Tensor]] = {}
    seen: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        for name, module, take_input in (
            (f"blocks.{layer}.hook_resid_post", block, False),
            (f"blocks.{layer}.hook_mlp_out", block.mlp, False),
            (f"blocks.{layer}.mlp.hook_post", block.mlp.down_proj, True),
        ):
            module.register_forward_hook(
                lambda m, i, o, name=name, take_input=take_input: seen.__setitem__(name, i[0] if take_input else o)
            )
    last = {"San Francisco": "Francisco", "France": "France", "Rome": "Rome", "Oslo": "Oslo"}
    for prompt in PROMPTS:
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        with torch.no_grad():
            model(ids)
        at = tokenizer.convert_ids_to_tokens(ids[0].tolist()).index(last[prompt.subject])
        for name, value in seen.items():
            kept.setdefault(name, []).append(value[0, at])
    return {name: torch.stack(rows) for name, rows in kept.items()}


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_backends_equal_plain_transformers(
    tiny: str, backend: str, reference: dict[str, torch.Tensor], tmp_path
) -> None:
    found = harvest(tiny, PROMPTS, HOOKS, backend=backend, store=tmp_path)
    assert list(found) == [
        *(f"blocks.{i}.hook_resid_post" for i in range(3)),
        "blocks.1.hook_mlp_out",
        "blocks.1.mlp.hook_post",
    ]
    assert found["blocks.1.mlp.hook_post"].shape == (4, 24)
    assert found.prepend_bos
    for hook, x in found.items():
        torch.testing.assert_close(x, reference[hook], rtol=1e-5, atol=1e-6)


def test_loaded_models(tiny: str, reference: dict[str, torch.Tensor]) -> None:
    """A bridge, and an nnsight model, that the user loaded; and a HookedTransformer with its own tokenizer."""
    for name in ("transformer_lens", "nnsight"):
        model = open_backend(find_model(tiny), name, torch.float32, "cpu").model
        found = harvest(model, PROMPTS, "blocks.2.hook_resid_post")
        torch.testing.assert_close(
            found["blocks.2.hook_resid_post"], reference["blocks.2.hook_resid_post"], rtol=1e-5, atol=1e-6
        )
        assert not found.from_store


def test_hooked_transformer(tiny: str) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=64, d_head=8, n_heads=2, d_mlp=24, act_fn="gelu", d_vocab=len(tokenizer)
    )
    model = HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    found = harvest(model, PROMPTS, ["blocks.*.hook_resid_post", "blocks.0.mlp.hook_post"])
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt.text).input_ids])
        _, cache = model.run_with_cache(ids)
        at = int(found.rows["blocks.1.hook_resid_post"][row, 1])
        for hook in ("blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"):
            torch.testing.assert_close(found[hook][row], cache[hook][0, at].cpu(), rtol=1e-5, atol=1e-6)


def test_second_run_reads_the_store(tiny: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harvest(tiny, PROMPTS, HOOKS, store=tmp_path)

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(sys.modules["atom_lens.activations.harvest"], "open_backend", no_model)
    second = harvest(tiny, PROMPTS, HOOKS, store=tmp_path)
    assert second.from_store and not first.from_store and second.prepend_bos
    for hook in first:
        assert torch.equal(first[hook], second[hook]) and torch.equal(first.rows[hook], second.rows[hook])
    with pytest.raises(AssertionError, match="loaded again"):
        harvest(tiny, PROMPTS, HOOKS, positions="last", store=tmp_path)
    with pytest.raises(AssertionError, match="loaded again"):
        harvest(tiny, PROMPTS[:2], HOOKS, store=tmp_path)


def test_store_key_follows_the_weights(tmp_path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    before = find_model(str(folder)).fingerprint
    time.sleep(0.01)
    save_tiny_model(folder, seed=1)
    assert find_model(str(folder)).fingerprint != before


def test_dtypes_and_stores(tiny: str, tmp_path, reference: dict[str, torch.Tensor]) -> None:
    for dtype in ("bfloat16", "float16"):
        first = harvest(tiny, PROMPTS, "blocks.0.hook_resid_post", dtype=dtype, store=tmp_path)
        again = harvest(tiny, PROMPTS, "blocks.0.hook_resid_post", dtype=dtype, store=tmp_path)
        x = again["blocks.0.hook_resid_post"].float()
        assert first["blocks.0.hook_resid_post"].dtype == again["blocks.0.hook_resid_post"].dtype
        assert again.from_store and torch.equal(first["blocks.0.hook_resid_post"].float(), x)
        torch.testing.assert_close(x, reference["blocks.0.hook_resid_post"], rtol=0.05, atol=0.01)


def test_a_killed_harvest_leaves_no_store(tiny: str, tmp_path) -> None:
    """Killed while the store is being written: the key is absent, and the next harvest makes it whole."""
    script = f"""
import os, signal
import atom_lens
from atom_lens.activations import store
save = store.save_file
def killed(*a, **k):
    save(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
store.save_file = killed
atom_lens.harvest({tiny!r}, ["Rome is a city"], "blocks.0.hook_resid_post", "last", store={str(tmp_path)!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ})
    assert ended.returncode == -signal.SIGKILL
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    found = harvest(tiny, ["Rome is a city"], "blocks.0.hook_resid_post", "last", store=tmp_path)
    assert not found.from_store
    assert harvest(tiny, ["Rome is a city"], "blocks.0.hook_resid_post", "last", store=tmp_path).from_store


def test_massive_rows_are_dropped_and_counted(tiny: str, tmp_path) -> None:
    kept = harvest(tiny, ["Rome is a city in the capital of Italy"], "blocks.0.hook_resid_post", "all", store=tmp_path)
    hook = "blocks.0.hook_resid_post"
    assert kept.dropped == {hook: 0} and len(kept[hook]) == 9
    norms = kept[hook].norm(dim=1)
    ratio = float((norms.max() + norms.sort().values[-2]) / 2 / norms.median())
    fewer = harvest(
        tiny,
        ["Rome is a city in the capital of Italy"],
        hook,
        "all",
        store=tmp_path,
        massive_ratio=max(ratio, 1.0001),
    )
    assert fewer.dropped[hook] == 1 and len(fewer[hook]) == len(fewer.rows[hook]) == 8
    assert int(norms.argmax()) + 1 not in fewer.rows[hook][:, 1].tolist()


def test_repeated_prefixes_are_read_once(tiny: str, tmp_path) -> None:
    """A causal model gives the same activation for the same prefix: kept, it would lie on both sides of a split."""
    prompts = [Prompt.fill(t, s) for s in ("Rome", "Oslo") for t in ("{} is", "{} in", "the city of {}")]
    hook = "blocks.0.hook_resid_post"
    for positions, n_all, n_unique in (("subject_last", 6, 4), ("span", 6, 4), ("last", 6, 6), ("all", 16, 11)):
        found = harvest(tiny, prompts, hook, positions, store=tmp_path)
        once = harvest(tiny, prompts, hook, positions, store=tmp_path, unique=True)
        assert len(found[hook]) == len(found.rows[hook]) == n_all
        assert len(once[hook]) == len(once.rows[hook]) == n_unique


def test_bos_is_ours_to_add(tiny: str, tmp_path) -> None:
    """With a tokenizer that adds no BOS by itself both backends read the same, and as asked."""
    folder = save_tiny_model(tmp_path / "no_bos")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert AutoTokenizer.from_pretrained(folder)("Rome").input_ids[0] != 1
    hook = "blocks.2.hook_resid_post"
    expected = harvest(tiny, PROMPTS, hook, store=tmp_path / "store")
    for backend in ("transformer_lens", "nnsight"):
        found = harvest(str(folder), PROMPTS, hook, backend=backend, store=tmp_path / "store")
        assert found.prepend_bos and torch.equal(found.rows[hook], expected.rows[hook])
        torch.testing.assert_close(found[hook], expected[hook], rtol=1e-5, atol=1e-6)
        bare = harvest(str(folder), PROMPTS, hook, backend=backend, store=tmp_path / "store", prepend_bos=False)
        assert not bare.prepend_bos and torch.equal(bare.rows[hook][:, 1], expected.rows[hook][:, 1] - 1)


def test_long_prompts_are_cut_at_the_context(tiny: str, tmp_path) -> None:
    found = harvest(tiny, ["Rome " * 200], "blocks.0.hook_resid_post", "all", store=tmp_path)
    assert len(found["blocks.0.hook_resid_post"]) == 63  # n_ctx 64, one of them BOS


def test_an_nnsight_model_is_loaded_when_needed(tiny: str) -> None:
    from nnsight import TransformersModel

    model = TransformersModel(tiny, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(tiny))
    assert not model.dispatched
    found = harvest(model, ["Rome is"], "blocks.0.hook_resid_post", "last")
    assert torch.isfinite(found["blocks.0.hook_resid_post"]).all()


def test_hook_patterns() -> None:
    names = [f"blocks.{i}.{name}" for i in range(3) for name in ("hook_resid_post", "hook_mlp_out")]
    assert expand_hooks(["blocks.*.hook_mlp_out"], names, 3) == names[1::2]
    assert expand_hooks(["blocks.1.hook_mlp_out", "blocks.1.*"], names, 3) == [names[3], names[2]]
    deep = [f"blocks.{layer}.hook_mlp_out" for layer in range(12)]
    assert expand_hooks(["blocks.*.hook_mlp_out"], sorted(deep), 12) == deep
    with pytest.raises(ValueError, match="near are blocks.1.hook_resid_post"):
        expand_hooks(["blocks.1.hook_resid_pots"], names, 3)
    with pytest.raises(ValueError, match="asks for layer 7, the model has layers 0 to 2"):
        expand_hooks(["blocks.7.hook_resid_post"], names, 3)
    with pytest.raises(ValueError, match="hooks is empty"):
        expand_hooks([], names, 3)


def test_nan_activations(tmp_path) -> None:
    folder = save_tiny_model(tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"hook 'blocks.1.hook_resid_post' gave NaN or infinite activations"):
        harvest(str(folder), PROMPTS, "blocks.1.hook_resid_post", store=tmp_path / "store")
    assert not list((tmp_path / "store").glob("[!.]*"))


def test_refuses_devices_and_hooks_that_are_not_there(tiny: str, tmp_path) -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not available"):
        harvest(tiny, ["Rome"], "blocks.0.hook_resid_post", "last", device="gpu", store=tmp_path)
    with pytest.raises(ValueError, match="blocks.0.hook_mlp_in"):
        harvest(tiny, ["Rome"], "blocks.0.hook_mlp_in", "last", store=tmp_path)


def test_truncated_weights(tmp_path) -> None:
    folder = save_tiny_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be loaded"):
        harvest(str(folder), ["Rome"], "blocks.0.hook_resid_post", "last", store=tmp_path / "store")


def test_refuses_what_is_no_model(tiny: str, tmp_path) -> None:
    with pytest.raises(ValueError, match="there are no prompts"):
        harvest(tiny, [], "blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="a dict is not a model with hooks"):
        harvest({}, ["Rome"], "blocks.0.hook_resid_post", "last")
    with pytest.raises(ValueError, match="has no config.json"):
        find_model(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        find_model(str(tmp_path / "missing.gguf"))
    with pytest.raises(ValueError, match="is not a demo model"):
        find_model("demo:other")


def test_a_model_that_no_hub_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model 'nobody/nothing' is neither a local folder"):
        find_model("nobody/nothing")


def test_broken_gguf(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ValueError, match="could not be converted"):
        find_model(str(path))
