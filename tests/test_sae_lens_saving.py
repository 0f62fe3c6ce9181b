"""Our training classes are saved, folded and loaded as sae-lens' own are."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    TrainingSAE,
)
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from support.architectures import ARCHITECTURES, D, F, config_of, planted, sae

from atom_lens import (
    AtomicInnerProduct,
    load_atoms,
)
from atom_lens.dictionaries.learning import Learning


@pytest.mark.parametrize(
    ("architecture", "options", "plain"),
    [
        ("aip_tsae", {"encoder": "tied"}, "jumprelu"),
        ("aip_tsae", {"encoder": "free"}, "jumprelu"),
        ("aip_topk", {"start": "data"}, "topk"),
        ("aip_pursuit", {"norm": 0.5, "prune": True}, "aip_pursuit"),
    ],
)
def test_configurations_go_round(architecture: str, options: dict[str, Any], plain: str) -> None:
    config = config_of(architecture, 3, d_in=D, d_sae=F, seed=7, first_activations=99, **options)
    again = TrainingSAEConfig.from_dict(config.to_dict())
    assert type(again) is get_sae_training_class(architecture)[1] and again.to_dict() == config.to_dict()
    inference = config.get_inference_sae_cfg_dict()
    atoms = SAEConfig.from_dict(inference)
    assert type(atoms) is get_sae_class(architecture)[1]
    assert atoms.to_dict() == {**inference, "architecture": plain}, "as any tool of sae-lens reads it"
    json.dumps(config.to_dict())


def random_weights(one: Any) -> Any:
    for parameter in one.parameters():
        parameter.data = torch.rand_like(parameter)
    return one


@torch.no_grad()
def test_folding_the_norm_of_atoms() -> None:
    one = random_weights(sae())
    two = deepcopy(one)
    two.fold_W_dec_norm()
    x, norms = torch.randn(10, 4, D), one.W_dec.norm(dim=1)
    torch.testing.assert_close(two.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(two.b_enc, one.b_enc * norms)
    torch.testing.assert_close(two.threshold, one.threshold * norms)
    torch.testing.assert_close(two.encode(x), one.encode(x) * norms)
    torch.testing.assert_close(two.decode(two.encode(x)), one.decode(one.encode(x)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_saved_and_loaded_before_training(architecture: str, tmp_path: Path) -> None:
    """Weights as sae-lens drew them are a dictionary without a metric, for training, inference and plain sae-lens."""
    one, x = random_weights(sae(architecture)), torch.randn(8, D)
    one.save_model(tmp_path / "training")
    again, atoms = TrainingSAE.load_from_disk(tmp_path / "training"), SAE.load_from_disk(tmp_path / "training")
    assert type(again) is get_sae_training_class(architecture)[0] and type(atoms) is get_sae_class(architecture)[0]
    assert again.cfg.to_dict() == one.cfg.to_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    one.save_inference_model(tmp_path / "inference")
    others = [again, atoms, SAE.load_from_disk(tmp_path / "inference"), load_atoms(tmp_path / "inference")]
    for other in others[1:] if architecture == "aip_pursuit" else others:
        one = atoms if architecture == "aip_pursuit" else one  # whose encoder is no pursuit before it has a threshold
        torch.testing.assert_close(other.encode(x), one.encode(x))
        torch.testing.assert_close(other(x), one(x))
    assert load_atoms(tmp_path / "inference").aip.source == "none: Euclidean"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_what_is_saved_in_training_goes_on(architecture: str, tmp_path: Path) -> None:
    """Contiguous, with the exact metric; loading it twice takes nothing from the state that is loaded."""
    one, x = sae(architecture, dtype="float32"), planted(2000)
    one.begin(x, AtomicInnerProduct.estimate(x, source="here"), torch.Generator().manual_seed(0))
    state = one.state_dict()
    one.process_state_dict_for_saving(state)
    assert all(value.is_contiguous() for value in state.values())
    one.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(again, Learning) and again.aip is not None and one.aip is not None
    assert again.aip.source == "here" and torch.equal(again.aip.metric, one.aip.metric)
    assert torch.equal(again.encode(x), one.encode(x))
    with pytest.raises(ValueError, match="checkpoint from the middle of training"):
        SAE.load_from_disk(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_atoms(tmp_path)
