"""Splice: edits of codes in a live model, on every backend, exact, composable, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    StandardSAE,
    StandardSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from support.live import HOOK, LATER, MASK, PADDED, TOKENS, Model, make_sae, open_model

from atom_lens import Splice, splice

EDITS: dict[str, Callable[[Splice], Any]] = {
    "ablate": lambda s: s.ablate(list(range(10))),
    "ablate all at one position": lambda s: s.ablate(positions=-2),
    "scale": lambda s: s.scale(range(20), 0.5, positions=[1, 3]),
    "scale per atom and item": lambda s: s.scale([1, 2], torch.tensor([[2.0, 0.0], [0.0, 2.0]])),
    "set": lambda s: s.set(4, 2.0, items=[1]),
    "add": lambda s: s.add([4, 5], torch.tensor([1.0, -2.0]), positions=MASK.bool()),
    "keep only": lambda s: s.keep_only([0, 1, 2]),
    "swap": lambda s: s.swap(torch.arange(40.0) / 40, positions=2, items=[0]),
    "exchange": lambda s: s.exchange(torch.ones(40), torch.arange(40.0) / 20),
    "patch": lambda s: s.patch(torch.ones(2, 16), positions=3),
    "two edits": lambda s: s.set([1, 2, 3], 1.0).scale([2], 3.0, positions=-1),
}


def reference(x: torch.Tensor, sae: SAE[Any], name: str) -> torch.Tensor:
    """Every edit of `EDITS` by plain loops over items, positions and atoms."""
    result = x.clone()
    w, thresholds = sae.W_dec.detach(), sae.threshold.detach()
    for i in range(x.shape[0]):
        for p in range(x.shape[1]):
            hidden = (x[i, p] - sae.b_dec.detach()) @ sae.W_enc.detach() + sae.b_enc.detach()
            z = torch.where((hidden > thresholds) & (hidden > 0), hidden, torch.zeros(()))
            new = z.clone()
            if name == "ablate":
                new[:10] = 0
            elif name == "ablate all at one position" and p == 5:
                new[:] = 0
            elif name == "scale" and p in (1, 3):
                new[:20] *= 0.5
            elif name == "scale per atom and item":
                new[1] *= 2.0 if i == 0 else 0.0
                new[2] *= 0.0 if i == 0 else 2.0
            elif name == "set" and i == 1:
                new[4] = 2.0
            elif name == "add" and MASK[i, p]:
                new[4] += 1
                new[5] -= 2
            elif name == "keep only":
                new[3:] = 0
            elif name == "swap" and i == 0 and p == 2:
                new = torch.arange(40.0) / 40
            elif name == "exchange":
                there = sum(min(float(z[j]), 1.0) for j in range(40))
                for j in range(40):
                    new[j] = float(z[j]) - min(float(z[j]), 1.0) + there / 40 * j / 20
            elif name == "two edits":
                new[1] = new[2] = new[3] = 1.0
                new[2] *= 3.0 if p == 6 else 1.0
            result[i, p] = x[i, p] + (new - z) @ w
            if name == "patch" and p == 3:
                result[i, p] = 1.0
    return result


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_what_they_say(tiny: str, name: str) -> None:
    """What stands behind the hook, against loops; on the bridge, whose cache sees it."""
    bridge, sae = open_model("bridge", tiny).model, make_sae()
    with torch.no_grad():
        _, before = bridge.run_with_cache(TOKENS)
        with splice(bridge, sae) as s:
            EDITS[name](s)
            _, after = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(after[HOOK], reference(before[HOOK], sae, name), rtol=1e-5, atol=1e-5)
    assert not torch.equal(after[HOOK], before[HOOK])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_backends_agree(tiny: str, name: str, padded: bool) -> None:
    found = []
    for kind in ("bridge", "nnsight"):
        live = open_model(kind, tiny)
        arguments = (PADDED, MASK) if padded else (TOKENS,)
        with torch.no_grad(), splice(live.model, [make_sae(), make_sae(LATER, seed=1)]) as s:
            EDITS[name](_At(s, HOOK))
            s.ablate([1], hook=LATER)
            found.append(live.logits(*arguments))
    real = MASK.bool() if padded else torch.ones_like(MASK).bool()
    torch.testing.assert_close(found[0][real], found[1][real], rtol=0, atol=1e-4)


class _At:
    """A splice at several hooks, seen as one at `hook`."""

    def __init__(self, s: Splice, hook: str) -> None:
        self.s, self.hook = s, hook

    def __getattr__(self, name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> _At:
            getattr(self.s, name)(*args, hook=self.hook, **kwargs)
            return self

        return method


@pytest.mark.parametrize("edit", [lambda s: s, lambda s: s.scale(None, 1.0), lambda s: s.swap(torch.ones(40)).clear()])
def test_without_effect_nothing_changes(live: Model, edit: Callable[[Splice], Any]) -> None:
    """No edit, an edit that changes nothing, and edits taken back; padded, unpadded, and in generation."""
    with torch.no_grad():
        clean, padded, generated = live.logits(TOKENS), live.logits(PADDED, MASK), live.generate(TOKENS, 6)
        with splice(live.model, make_sae()) as s:
            edit(s)
            torch.testing.assert_close(live.logits(TOKENS), clean, rtol=0, atol=1e-5)
            torch.testing.assert_close(live.logits(PADDED, MASK), padded, rtol=0, atol=1e-5)
            assert torch.equal(live.generate(TOKENS, 6), generated)


@pytest.mark.parametrize("positions", [None, -1, 2, "mask"])
def test_generation_with_a_cache(live: Model, positions: Any) -> None:
    """Greedy decoding under an edit equals re-running the whole text under the same edit, token by token.

    Without positions the edit also holds for the generated tokens; columns and masks are of the prompt.
    """
    sae, n = make_sae(), 6
    where: Any = torch.eye(7, dtype=torch.bool)[[2, 5]] if isinstance(positions, str) else positions
    with torch.no_grad():
        clean = live.logits(TOKENS)
        with splice(live.model, sae) as s:
            s.add([3, 4, 5], 1000.0, positions=where)
            assert not torch.allclose(live.logits(TOKENS)[:, -1], clean[:, -1], atol=1e-3), "the edit shows"
            generated = live.generate(TOKENS, n)
        text = TOKENS
        for step in range(n):
            with splice(live.model, sae) as s:
                place = where
                if isinstance(positions, str):
                    place = torch.cat([where, torch.zeros(2, step, dtype=torch.bool)], dim=1)
                elif positions == -1:
                    place = 6
                s.add([3, 4, 5], 1000.0, positions=place)
                text = torch.cat([text, live.logits(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, text)


def test_replace_is_sae_lens_own_splice(tiny: str) -> None:
    """`replace=True` without edits gives what an SAE attached to a SAETransformerBridge gives."""
    bridge, sae = open_model("sae_bridge", tiny).model, make_sae()
    with torch.no_grad():
        with bridge.saes(sae):
            theirs = bridge(TOKENS)
        with splice(bridge, sae, replace=True):
            ours = bridge(TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
def test_saes_that_normalise(tiny: str, normalise: str) -> None:
    """An edit of an SAE that rescales its input acts in the scale of the model."""
    bridge = open_model("bridge", tiny).model
    sae = StandardSAE(
        StandardSAEConfig(d_in=16, d_sae=40, normalize_activations=normalise, metadata=SAEMetadata(hook_name=HOOK))
    )
    with torch.no_grad():
        _, before = bridge.run_with_cache(TOKENS)
        x = before[HOOK]
        codes = sae.encode(x)
        full = sae.decode(codes)
        sae.encode(x)  # sae-lens forgets the norm once it has decoded
        without = sae.decode(codes * (torch.arange(40) != 7))
        with splice(bridge, sae) as s:
            s.ablate(7)
            _, after = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(after[HOOK], x + without - full, rtol=1e-5, atol=1e-5)


def test_heads(tiny: str) -> None:
    """SAEs on hook_z read heads side by side, which a HookedTransformer keeps apart."""
    hooked, hook = open_model("hooked", tiny).model, "blocks.1.attn.hook_z"
    sae = make_sae(hook, reshape_activations="hook_z")
    with torch.no_grad():
        _, before = hooked.run_with_cache(TOKENS)
        flat = before[hook].flatten(2)
        sae.turn_off_forward_pass_hook_z_reshaping()
        codes = sae.encode(flat)
        sae.turn_on_forward_pass_hook_z_reshaping()
        with splice(hooked, sae) as s:
            s.ablate()
            _, after = hooked.run_with_cache(TOKENS)
    expected = (flat - codes @ sae.W_dec).unflatten(2, before[hook].shape[2:])
    torch.testing.assert_close(after[hook], expected, rtol=1e-5, atol=1e-5)


def test_an_sae_of_heads_is_left_as_it_was(tiny: str) -> None:
    """Used on heads of width 8 before, within and after a splice; sae-lens remembers that width in the SAE."""
    hooked, hook = open_model("hooked", tiny).model, "blocks.1.attn.hook_z"
    sae = make_sae(hook, reshape_activations="hook_z")
    with torch.no_grad():
        z = hooked.run_with_cache(TOKENS)[1][hook]
        before = sae(z)
        with splice(hooked, sae) as s:
            s.ablate([1])
            hooked(TOKENS)
        assert torch.equal(sae(z), before) and before.shape == z.shape


def test_gradients_flow(live: Model) -> None:
    """Through the spliced activation, the codes and the values of an edit: against finite differences."""
    sae, amount = make_sae(), torch.zeros(2, requires_grad=True)

    def loss() -> torch.Tensor:
        with splice(live.model, sae) as s:
            s.scale([0, 1, 2], 0.5).add([5, 6], amount, positions=2)
            return live.logits(TOKENS)[:, -1].square().sum()

    (gradient,) = torch.autograd.grad(loss(), amount)
    with torch.no_grad():
        for i in range(2):
            step = torch.eye(2)[i] * 0.05
            amount += step
            up = loss()
            amount -= 2 * step
            down = loss()
            amount += step
            assert float(gradient[i]) == pytest.approx(float(up - down) / 0.1, rel=2e-2)
            assert abs(float(gradient[i])) > 1e-9


def test_layers_at_once_and_nested(live: Model) -> None:
    """Two hooks in one splice act like two nested splices; the inner one leaves the outer one in place."""
    one, two = make_sae(), make_sae(LATER, seed=1)
    with torch.no_grad():
        with splice(live.model, {HOOK: one, LATER: two}) as s:
            assert s.hooks == [HOOK, LATER]
            s.ablate([3, 4, 5], hook=HOOK).add(7, 5.0, hook=LATER)
            both = live.logits(TOKENS)
        with splice(live.model, one) as outer:
            outer.ablate([3, 4, 5])
            first = live.logits(TOKENS)
            with splice(live.model, two) as inner:
                inner.add(7, 5.0)
                assert torch.equal(live.logits(TOKENS), both)
            assert torch.equal(live.logits(TOKENS), first)
    assert not torch.equal(first, both)
