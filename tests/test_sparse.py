"""The sparse training step: the same losses, gradients and training as the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput

from atom_lens import AtomicInnerProduct, TSAETraining, TSAETrainingConfig
from atom_lens.dictionaries import Learner
from atom_lens.dictionaries.tsae import training
from atom_lens.dictionaries.tsae.sparse import Entries, read_sparsely, search, sparse_decode, sparse_encode
from atom_lens.recipe.sections import Training
from atom_lens.training.fit import fit_together


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 7), d=st.integers(1, 5), f=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_sparse_products(batch: int, d: int, f: int, share: float, seed: int) -> None:
    """Values and gradients against dense products, empty rows, columns and masks included."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, f, generator=generator) < share
    entries = Entries.where(mask)
    assert torch.equal(torch.stack([entries.rows, entries.columns]), mask.nonzero().T)
    x, weight = (torch.randn(batch, d, generator=generator, dtype=torch.float64) for _ in range(2))
    starts = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((f, d), (f,), (d,))]
    found = []
    for sparse in (False, True):
        atoms, b_enc, b_dec = (start.clone().requires_grad_() for start in starts)
        product = (x - b_dec) @ atoms.T + b_enc
        if sparse:
            values = product.detach()[entries.rows, entries.columns]
            values = sparse_encode(values, x - b_dec.detach(), atoms, b_enc, b_dec, entries)
            out = sparse_decode(values, atoms, entries)
        else:
            out = (product * mask) @ atoms
        (out * weight).sum().backward()
        found.append((out.detach(), atoms.grad, b_enc.grad, b_dec.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def made(
    step: str, generator: torch.Generator, **options: Any
) -> tuple[TSAETraining, torch.Tensor, AtomicInnerProduct]:
    x = shifted(300, 12, generator)
    aip = AtomicInnerProduct.estimate(x)
    config = TSAETrainingConfig(d_in=12, d_sae=60, target_l0=3.0, jumprelu_bandwidth=0.2, step=step, **options)
    with torch.random.fork_rng(devices=[]):
        sae = TSAETraining(config)
    sae.begin(x, aip, torch.Generator().manual_seed(0))
    return sae, x, aip


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("encoder", ["tied", "free"])
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_one_step_is_the_dense_one(product: Any, encoder: Any, to_input: bool, dead: bool) -> None:
    found = []
    for step in ("dense", "sparse"):
        sae, x, _ = made(
            step,
            torch.Generator().manual_seed(1),
            encoder_product=product,
            encoder=encoder,
            jumprelu_ste_to_input=to_input,
        )
        sae = sae.double().train()
        mask = (torch.arange(60) % 3 == 0) if dead else None
        output = sae.training_forward_pass(TrainStepInput(x[:64].double(), {"l0": 0.3}, mask, 0, False))
        output.loss.backward()
        grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        found.append((output, grads, sae))
    (one, dense, _), (two, sparse, sae) = found
    assert 0 < float(sae.density) < 0.5 and dense.keys() == sparse.keys()
    torch.testing.assert_close(one.loss, two.loss)
    assert one.losses.keys() == two.losses.keys()
    for name in one.losses:
        torch.testing.assert_close(one.losses[name], two.losses[name])
    torch.testing.assert_close(one.feature_acts, two.feature_acts.to_dense())
    for name in dense:
        assert dense[name].norm() > 0, f"{name} has no gradient to compare"
        close = 1e-5 if name == "threshold" else 1e-9  # sae-lens keeps thresholds in float32, whatever is asked
        torch.testing.assert_close(dense[name], sparse[name], rtol=close, atol=close)


@settings(max_examples=80, deadline=None)
@given(
    d=st.integers(1, 700),
    f=st.integers(1, 12),
    scale=st.floats(1e-3, 1e3),
    at=st.floats(-2, 2),
    close=st.booleans(),
    worst=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_search_misses_none(d: int, f: int, scale: float, at: float, close: bool, worst: bool, seed: int) -> None:
    """Of either precision, at cutoffs that entries are a rounding error away from as well; and not far off.

    At worst all that rounding takes points the same way, as the bound has it.
    """
    generator = torch.Generator().manual_seed(seed)
    x, directions = scale * torch.randn(5, d, generator=generator), torch.randn(f, d, generator=generator)
    if worst:
        x, directions = (torch.full_like(one, 1 + 0.49 * 2**-7) for one in (x, directions))
    exact = x.double() @ directions.double().T
    lengths = x.norm(dim=1, keepdim=True) * directions.norm(dim=1)
    cutoff = exact[2].float() * (1 - 2**-20) if close else at * lengths.mean(dim=0) / d**0.5
    for precision, slack in (("float32", 1e-4), ("bfloat16", 0.011)):
        entries, values = search(x, directions, cutoff, precision)
        mask = torch.zeros(exact.shape, dtype=torch.bool)
        mask[entries.rows, entries.columns] = True
        torch.testing.assert_close(values.double(), exact[mask], rtol=1e-4, atol=1e-4 * float(lengths.max()))
        rounding = 2**-23 * d * lengths if precision == "float32" else 0
        assert mask[exact > cutoff + rounding].all(), "none is missed"
        assert (exact + slack * lengths + 2**-12 * cutoff.abs() >= cutoff)[mask].all(), "what is found is near"


@pytest.mark.parametrize("encoder", ["tied", "free"])
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_training_is_the_same(product: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole training in float64 through sae-lens' trainer, dead atoms and a switch between both steps included."""
    monkeypatch.setattr(training, "DENSITY_LIMIT", 0.12)
    trained, sparsity, kinds = {}, {}, []

    def counting(*arguments: Any) -> Any:
        kinds.append("sparse")
        return read_sparsely(*arguments)

    monkeypatch.setattr(training, "read_sparsely", counting)
    for step in ("dense", "sparse"):
        sae, x, _ = made(step, torch.Generator().manual_seed(1), encoder=encoder, encoder_product=product)
        settings_ = Training(steps=80, batch_size=64, lr=3e-3, device="cpu", dead_after=5)
        sae = sae.double()
        sparsity[step] = fit_together({"x": x.double()}, {"tsae": Learner(sae)}, settings_)["tsae"]
        trained[step] = sae
    assert 10 < len(kinds) < 80, "both kinds of step were taken"
    for name, value in trained["dense"].state_dict().items():
        if name != "density":
            torch.testing.assert_close(value, trained["sparse"].state_dict()[name], rtol=1e-6, atol=1e-8)
    assert torch.equal(sparsity["dense"], sparsity["sparse"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"jumprelu_sparsity_loss_mode": "tanh"},
            "loss_mode is 'tanh', allowed for aip_tsae is 'quadratic'",
        ),
        ({"pre_act_loss_coefficient": 3e-6}, "pre_act_loss_coefficient is 3e-06, allowed for aip_tsae is None"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', allowed with step 'sparse' are 'float32' and 'float64'"),
    ],
)
def test_what_is_not_there_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TSAETrainingConfig(**{"d_in": 4, "d_sae": 8, "target_l0": 2.0, **change})
