"""Hooks over architectures: both backends read the same there, and edits there do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import WORDS, save_tiny_model
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from support.live import make_sae

from atom_lens import harvest, splice
from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import find_model, load_model

IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(set(WORDS)) + 3}
OLD: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **IDS}
NEW: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, **IDS},
}
ONE_KEY = {"num_key_value_heads": 1, "head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertLMHeadModel(tf.BertConfig(**NEW, is_decoder=True)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **IDS)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**NEW, parallel_attn=True, bias=False)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**NEW, **ONE_KEY)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**OLD)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**OLD, rotary_dim=4)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**NEW)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**NEW, num_key_value_heads=1, num_local_experts=4)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**NEW)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(hidden_size=16, ffn_dim=24, word_embed_proj_dim=16, **_FEWER)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**NEW)),
}
_FEWER = {key: value for key, value in NEW.items() if key not in ("hidden_size", "intermediate_size")}

# BERT's norms stand behind each sum: what attention and MLP give is not what the residual stream gains.
NO_SUM = ("bert",)

PROMPTS = ["Paris is a city in France", "Rome is", "Oslo"]
TOKENS = torch.tensor([[1, 20, 31, 42, 53], [1, 9, 8, 47, 6]])
PARTS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
WIDE = ("mlp.hook_post", "attn.hook_z", "attn.hook_q")


class Pair:
    """One model under both backends."""

    def __init__(self, name: str, folder: Path) -> None:
        save_tiny_model(folder)  # for its tokenizer
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.3)
        model.save_pretrained(folder)
        self.name, self.folder = name, str(folder)
        self.backends: list[Backend] = [
            open_backend(find_model(self.folder), kind, torch.float32, "cpu")
            for kind in ("transformer_lens", "nnsight")
        ]

    def logits(self, backend: Backend) -> torch.Tensor:
        return backend.logits(TOKENS, torch.ones_like(TOKENS), TOKENS.shape[1])

    def shared(self, parts: tuple[str, ...]) -> list[str]:
        """Those hooks of layer 0 that both backends can read."""
        found = []
        for hook in (f"blocks.0.{part}" for part in parts):
            try:
                for backend in self.backends:
                    harvest(backend, PROMPTS[:1], hook, "last")
                found.append(hook)
            except ValueError:
                assert hook.endswith(("hook_q", "hook_mlp_out")), "q and k of one product are the bridge's alone"
        return found


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_what_blocks_add_is_what_they_leave(pair: Pair) -> None:
    """pre + attention + MLP = post, though a model may add in place, and both backends read the same."""
    hooks = [f"blocks.{layer}.{part}" for layer in range(2) for part in PARTS]
    hooks += pair.shared(WIDE)
    lens, traced = (harvest(backend, PROMPTS, hooks, "all", massive_ratio=None) for backend in pair.backends)
    for hook in hooks:
        torch.testing.assert_close(lens[hook], traced[hook], rtol=1e-4, atol=1e-5)
        assert torch.equal(lens.rows[hook], traced.rows[hook])
    for layer in range(2):
        pre, attention, mlp, post = (traced[f"blocks.{layer}.{part}"] for part in PARTS)
        holds = torch.allclose(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)
        assert holds == (pair.name not in NO_SUM)


def test_the_table_in_the_docs(pair: Pair) -> None:
    """Of every architecture, which hooks both backends can read."""
    lines = (Path(__file__).parent.parent / "docs" / "api" / "activations.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    heads, rows = table[0], {row[0]: row for row in table[2:]}
    assert set(rows) == set(MODELS)
    said = dict(zip(heads[1:], rows[pair.name][1:], strict=True))
    shared = pair.shared((*PARTS, *WIDE))
    for names, backends in said.items():
        for name in names.split(", "):
            hook = f"blocks.0.{name}"
            assert (hook in shared) == (backends == "both") and backends in ("both", "TransformerLens"), hook
            assert harvest(pair.backends[0], PROMPTS[:1], hook, "last")[hook].shape[0] == 1


def test_models_that_look_ahead_are_refused(tmp_path: Path) -> None:
    """Prompts are cut after the token that is read: a BERT that reads to both sides would give something else."""
    folder = str(save_tiny_model(tmp_path))
    tf.BertLMHeadModel(tf.BertConfig(**NEW, is_decoder=False)).save_pretrained(folder)
    for backend in ("transformer_lens", "nnsight"):
        with pytest.raises(ValueError, match=r"hook 'blocks.1.hook_out' depends on tokens that follow"):
            harvest(folder, PROMPTS, "blocks.1.hook_out", "last", backend, store=tmp_path / "store")
    hook = "blocks.0.hook_in"
    assert harvest(folder, PROMPTS, hook, "last", store=tmp_path / "store")[hook].shape == (3, 16)


def test_edits_do_the_same(pair: Pair) -> None:
    """Patches and edits of codes at every hook; without effect they leave the logits alone."""
    clean = pair.logits(pair.backends[0])
    for hook in pair.shared((*PARTS, *WIDE)):
        width = harvest(pair.backends[0], PROMPTS[:1], hook, "last")[hook].shape[1]
        sae, found = make_sae(hook, width), []
        for backend in pair.backends:
            with splice(backend, sae) as s:
                s.scale(None, 1.0)
                torch.testing.assert_close(pair.logits(backend), clean, rtol=1e-4, atol=1e-4)
                s.clear().patch(torch.ones(2, width), positions=[1, 3]).add([2, 3], 50.0, positions=2)
                found.append(pair.logits(backend))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[0], clean, atol=1e-2)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_what_is_no_activation_is_refused(llama: Pair, prompts: list[str]) -> None:
    """Tables of positions, which serve all prompts and with one prompt look like activations; attention patterns."""
    bridge = llama.backends[0]
    for name, shape in (("hook_cos", r"\(1, 7, 8\)"), ("hook_sin", ""), ("hook_pattern", "")):
        message = rf"hook 'blocks.1.attn.{name}' has shape {shape}.*"
        with pytest.raises(ValueError, match=message + r"allowed are activations \(batch, pos, width\)"):
            harvest(bridge, prompts, f"blocks.1.attn.{name}", "last")
    with (
        pytest.raises(ValueError, match="hook 'blocks.1.attn.hook_cos' has shape"),
        splice(bridge, make_sae("blocks.1.attn.hook_cos", 8)) as s,
    ):
        s.ablate(1)
        llama.logits(bridge)


def test_an_edit_where_nothing_fires_is_refused(gpt2: Pair) -> None:
    """A bridge splits GPT-2's product of q, k and v into three, and never comes by its own hook."""
    hook = "blocks.0.attn.qkv.hook_out"
    bridge, traced = gpt2.backends
    with pytest.raises(ValueError, match=f"hook '{hook}' is named by the model but never fires"):  # noqa: SIM117
        with splice(bridge, make_sae(hook, 48)) as s:
            s.ablate()
            gpt2.logits(bridge)
    with splice(traced, make_sae(hook, 48)) as s:
        s.ablate()
        gpt2.logits(traced)


def state(backend: Any) -> list[Any]:
    """Modes, hooks and what wants gradients, of every module."""
    root = getattr(backend.model, "original_model", None) or backend.model._module
    modules = [*root.modules(), *getattr(backend.model, "hook_dict", {}).values()]
    flags = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in modules]
    return [*flags, [p.requires_grad for p in root.parameters()], torch.is_grad_enabled()]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_model_is_left_as_it_was(gpt2: Pair, index: int, error: type[BaseException] | None) -> None:
    """In train mode dropout is off while activations and logits are read, and on again after, whatever happens."""
    backend, hook = gpt2.backends[index], "blocks.1.hook_resid_post"
    root = getattr(backend.model, "original_model", None) or backend.model._module
    expected, logits = harvest(backend, PROMPTS, hook, "all")[hook], gpt2.logits(backend)
    root.train()
    root.transformer.ln_f.eval()
    block = root.transformer.h[1]
    handle = None

    def fail(*_: Any) -> None:
        assert error is not None
        raise error("in the block")

    try:
        if error is not None:
            handle = block.register_forward_pre_hook(fail)
        before = state(backend)
        if error is not None:
            with pytest.raises(error, match="in the block"):
                harvest(backend, PROMPTS, hook, "all")
        else:
            assert torch.equal(harvest(backend, PROMPTS, hook, "all")[hook], expected)
            assert torch.equal(gpt2.logits(backend), logits)
        assert state(backend) == before
    finally:
        if handle is not None:
            handle.remove()
        root.eval()
    assert torch.equal(harvest(backend, PROMPTS, hook, "all")[hook], expected)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("part", ["hook_resid_post", "mlp.hook_post"])
def test_what_an_open_splice_does_is_read(gpt2: Pair, index: int, part: str) -> None:
    hook = f"blocks.1.{part}"
    width = 16 if part == "hook_resid_post" else 64
    with splice(gpt2.backends[index], make_sae(hook, width)) as s:
        s.patch(torch.ones(width))
        assert bool((harvest(gpt2.backends[index], PROMPTS, hook, "all")[hook] == 1).all())


def test_hooks_of_the_user(gpt2: Pair) -> None:
    """What a user's hook changes is read as changed, and the hook stays."""
    bridge, hook = gpt2.backends[0], "blocks.0.hook_mlp_out"
    point = bridge.model.hook_dict["blocks.0.mlp.hook_out"]  # type: ignore[attr-defined]
    point.add_hook(lambda tensor, hook: torch.ones_like(tensor))
    assert bool((harvest(bridge, PROMPTS, hook, "all")[hook] == 1).all()) and len(point.fwd_hooks) == 1
    point.remove_hooks()


def test_an_attached_sae_is_named(gpt2: Pair) -> None:
    """It stands in the place of its hook point; what comes after it is read as the model has it."""
    model, tokenizer = load_model(find_model(gpt2.folder), torch.float32, "cpu")
    bridge: Any = SAETransformerBridge.boot_transformers(gpt2.folder, hf_model=model, tokenizer=tokenizer)
    hook, later = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    clean = harvest(bridge, PROMPTS, later, "all")[later]
    with bridge.saes(make_sae(hook)):
        with pytest.raises(ValueError, match=f"an sae-lens SAE is attached at hook '{hook}'"):
            harvest(bridge, PROMPTS, hook, "all")
        assert not torch.allclose(harvest(bridge, PROMPTS, later, "all")[later], clean, atol=1e-2)
    assert torch.equal(harvest(bridge, PROMPTS, later, "all")[later], clean)
