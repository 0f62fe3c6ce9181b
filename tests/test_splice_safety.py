"""Splices leave nothing behind, and refuse what they cannot do."""

from __future__ import annotations

import gc

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from support.live import HOOK, LATER, MASK, TOKENS, Model, make_sae, open_model

from atom_lens import splice


def hooks_of(live: Model) -> int:
    """All forward hooks and pre-hooks of every module of the model."""
    root = live.model._module if hasattr(live.model, "_module") else live.model
    modules = {*root.modules(), *getattr(root, "hook_dict", {}).values()}
    if hasattr(root, "original_model"):
        modules |= set(root.original_model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_nothing_leaks(live: Model) -> None:
    """Hundreds of splices, some of which fail: the same logits, no hook left, no memory kept."""
    sae = make_sae()
    with torch.no_grad():
        clean, before = live.logits(TOKENS), hooks_of(live)

        def cycle(i: int) -> None:
            try:
                with splice(live.model, sae) as s:
                    s.ablate([1, 2, 3])
                    if i % 100 == 0:
                        live.logits(TOKENS)
                    if i % 3 == 0:
                        raise RuntimeError("in the block")
            except RuntimeError:
                pass

        for i in range(50):
            cycle(i)
        gc.collect()
        objects = len(gc.get_objects())
        for i in range(300):
            cycle(i)
        gc.collect()
        assert len(gc.get_objects()) - objects < 100, "no object per splice is kept"
        assert torch.equal(live.logits(TOKENS), clean)
    assert hooks_of(live) == before


def test_an_error_in_the_forward_pass_leaves_nothing(live: Model) -> None:
    clean, before = live.logits(TOKENS), hooks_of(live)
    with (
        pytest.raises(ValueError, match="position 7 is outside the prompt with its padding, allowed are -7 to 6"),
        splice(live.model, make_sae()) as s,
    ):
        s.ablate(1, positions=7)
        live.logits(TOKENS)
    assert hooks_of(live) == before
    assert torch.equal(live.logits(TOKENS), clean)


def test_users_own_hooks_live_beside(tiny: str) -> None:
    """run_with_hooks inside a splice sees the edited activation, and its cleaning up leaves the splice alone."""
    bridge, sae, seen = open_model("bridge", tiny).model, make_sae(), []
    with torch.no_grad(), splice(bridge, sae) as s:
        s.ablate()
        edited = bridge(TOKENS)
        again = bridge.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda tensor, hook: seen.append(tensor.clone()))])
        assert torch.equal(again, edited) and torch.equal(bridge(TOKENS), edited)
        _, cache = bridge.run_with_cache(TOKENS)
        assert torch.equal(seen[0], cache[HOOK])
        bridge.reset_hooks()
        assert torch.equal(bridge(TOKENS), edited), "many notebooks reset hooks before a run"
    with splice(bridge, sae) as s:
        assert torch.equal(bridge(TOKENS), bridge(TOKENS)) and not bridge.hook_dict["blocks.1.hook_out"].fwd_hooks[1:]
    assert not bridge.hook_dict["blocks.1.hook_out"].fwd_hooks


def test_integer_masks_are_masks(tiny: str) -> None:
    """An attention mask, or (tokens == id).long(), means the same as its booleans; a tensor of columns is columns."""
    bridge, sae = open_model("bridge", tiny).model, make_sae()
    mask = torch.zeros_like(TOKENS)
    mask[0, 3] = 1
    found = []
    for positions in (mask, mask.bool()):
        with torch.no_grad(), splice(bridge, sae) as s:
            s.patch(torch.ones(16), positions=positions)
            found.append(bridge.run_with_cache(TOKENS)[1][HOOK])
    assert torch.equal(found[0], found[1]) and int((found[0] == 1).all(dim=-1).sum()) == 1
    for positions in (torch.tensor([2, 3]), [2, 3]):
        with torch.no_grad(), splice(bridge, sae) as s:
            s.ablate(positions=positions)
            found.append(bridge(TOKENS))
    assert torch.equal(found[2], found[3])


def test_bad_input(tiny: str) -> None:
    bridge, sae = open_model("bridge", tiny).model, make_sae()
    with pytest.raises(
        ValueError, match="hook 'blocks.7.hook_resid_post' asks for layer 7, the model has layers 0 to 2"
    ):
        splice(bridge, make_sae("blocks.7.hook_resid_post"))
    with pytest.raises(ValueError, match="hook 'blocks.1.hook_z_post' is not in this model, near are"):
        splice(bridge, make_sae("blocks.1.hook_z_post"))
    with pytest.raises(ValueError, match=r"is a pattern, a splice takes names"):
        splice(bridge, {"blocks.*.hook_resid_post": sae})
    with pytest.raises(ValueError, match="does not say which hook it belongs to"):
        splice(bridge, JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=4)))
    with pytest.raises(ValueError, match="two SAEs belong to hook"):
        splice(bridge, [sae, make_sae(seed=1)])
    with pytest.raises(ValueError, match="a dict is not a model with hooks"):
        splice({}, sae)
    transcoder = Transcoder(
        TranscoderConfig(
            d_in=16,
            d_sae=8,
            d_out=16,
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=HOOK, hook_name_out=LATER),
        )
    )
    with pytest.raises(ValueError, match=f"writes to '{LATER}': a splice takes SAEs that write where they read"):
        splice(bridge, transcoder)
    with splice(bridge, sae) as s, pytest.raises(ValueError, match="this splice is already open"), s:
        pass
    batch = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=8, k=2))
    with pytest.raises(ValueError, match="architecture 'batchtopk', whose codes depend on other tokens or items"):
        splice(bridge, {HOOK: batch})
    with splice(bridge, [sae, make_sae(LATER)]) as s:
        with pytest.raises(ValueError, match=f"hook is None, atoms are spliced at {HOOK}, {LATER}"):
            s.ablate(1)
        with pytest.raises(ValueError, match=f"atom 40 is outside the dictionary at '{HOOK}', allowed are 0 to 39"):
            s.ablate([3, 40], hook=HOOK)
        with pytest.raises(ValueError, match="allowed are 0 to 39"):
            s.keep_only(-1, hook=HOOK)
        with pytest.raises(ValueError, match=r"atoms is \[1, 1\], expected at least one index and each only once"):
            s.ablate([1, 1], hook=HOOK)
    for edit, message in (
        (lambda s: s.ablate(1, items=[2]), "item 2 is outside the batch, allowed are 0 to 1"),
        (lambda s: s.swap(torch.ones(39)), r"a value has shape \(39,\), allowed are a number, \(40,\) for the chosen"),
        (lambda s: s.swap(torch.ones(1, 40)), "a value has 1 rows, the batch has an item 1"),
        (lambda s: s.ablate(1, positions=MASK[:, :3].bool()), r"a mask of shape \(2, 3\), the prompt has \(2, 7\)"),
        (lambda s: s.patch(torch.ones(15)), r"a value has shape \(15,\)"),
    ):
        with pytest.raises(ValueError, match=message), splice(bridge, sae) as s:
            edit(s)
            bridge(TOKENS)
    with (
        pytest.raises(ValueError, match=r"activations of shape \(2, 7, 16\), these atoms have d_in 12"),
        splice(bridge, make_sae(d_in=12)) as s,
    ):
        s.ablate(1)
        bridge(TOKENS)
    attached = open_model("sae_bridge", tiny).model
    with (
        attached.saes(sae),
        pytest.raises(ValueError, match="an sae-lens SAE is attached at hook"),
        splice(attached, sae),
    ):
        pass


def test_a_splice_inside_a_trace_is_refused(tiny: str) -> None:
    traced = open_model("nnsight", tiny).model
    with pytest.raises(ValueError, match="inside a running nnsight trace: open the splice first, then trace"):  # noqa: SIM117
        with traced.trace({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}):
            with splice(traced, make_sae()) as s:
                s.ablate(1)
