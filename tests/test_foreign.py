"""Dictionaries of other libraries: what sae-lens computes from them is what their own classes compute."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from safetensors.torch import save_file

from atom_lens import TSAE, convert, evaluate, load_atoms
from atom_lens.cli import main
from atom_lens.dictionaries.foreign import foreign_converter
from atom_lens.dictionaries.load import matching

D, F = 6, 10


def randomised(module: torch.nn.Module, generator: torch.Generator) -> Any:
    """Every weight drawn, so that no bias is zero and nothing is symmetric; thresholds stay above zero."""
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.is_floating_point():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data = value.abs() / 3 if "threshold" in name else value
    return module.eval()


def converted(folder: Path) -> SAE[Any]:
    return SAE.load_from_disk(folder, converter=foreign_converter)


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(50, D, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsify(x: torch.Tensor, generator: torch.Generator, tmp_path: Path, dtype: torch.dtype) -> None:
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: pip install '.[test]'")
    coder = randomised(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=3)), generator).to(dtype)
    coder.save_to_disk(tmp_path / "run" / "layers.7")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    sae = converted(tmp_path / "run" / "layers.7")
    assert sae.cfg.architecture() == "topk" and sae.cfg.metadata.hook_name == "blocks.7.hook_resid_post"
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-160m" and sae.W_dec.dtype == dtype
    with torch.no_grad():
        theirs = coder.encode(x.to(dtype))
        codes = torch.zeros(len(x), F, dtype=dtype).scatter(1, theirs.top_indices, theirs.top_acts)
        # sparsify adds the bias while it multiplies, sae-lens after: in bfloat16 that is another rounding.
        close = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(sae.encode(x.to(dtype)).to_dense(), codes, **close)
        torch.testing.assert_close(sae(x.to(dtype)), coder.decode(theirs.top_acts, theirs.top_indices), **close)
    with pytest.raises(ValueError, match="architecture is 'topk', atoms are jumprelu or standard"):
        load_atoms(tmp_path / "run" / "layers.7")
    cfg = tmp_path / "run" / "layers.7" / "cfg.json"
    cfg.write_text(json.dumps({**json.loads(cfg.read_text()), "transcode": True}))
    with pytest.raises(ValueError, match="transcode is True, allowed is False"):
        converted(tmp_path / "run" / "layers.7")


CLASSES: dict[str, Callable[[Any], Any]] = {
    "AutoEncoder": lambda made: made.AutoEncoder(D, F),
    "AutoEncoderNew": lambda made: made.AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda made: made.GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda made: made.JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda made: made.trainers.top_k.AutoEncoderTopK(D, F, 3),
    "BatchTopKSAE": lambda made: made.trainers.batch_top_k.BatchTopKSAE(D, F, 3),
    "MatryoshkaBatchTopKSAE": lambda made: made.trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, 3, [4, 6]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(x: torch.Tensor, generator: torch.Generator, tmp_path: Path, name: str) -> None:
    """Its own classes, saved as it saves them."""
    pytest.importorskip("dictionary_learning", reason="pip install --no-deps dictionary-learning (it pins old nnsight)")
    import dictionary_learning.dictionary as made
    from dictionary_learning import trainers
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k  # noqa: F401

    made.trainers = trainers
    theirs = randomised(CLASSES[name](made), generator)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "k": 3, "layer": 4, "lm_name": "EleutherAI/pythia-70m"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    sae = converted(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(x)
        torch.testing.assert_close(sae.encode(x).to_dense(), codes)
        torch.testing.assert_close(sae(x), theirs(x))
    assert (codes == 0).any() and (codes > 0).any()
    assert sae.cfg.metadata.hook_name == "blocks.4.hook_resid_post"
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-70m"
    if sae.cfg.architecture() in ("jumprelu", "standard"):
        torch.testing.assert_close(load_atoms(tmp_path).encode(x), codes)


def reference(state: dict[str, Any], x: np.ndarray, subtract: bool) -> np.ndarray:
    """JumpReLU codes, written out."""
    z = (x - state["b_dec"] * subtract) @ state["W_enc"] + state["b_enc"]
    return np.where(z > state["threshold"], np.maximum(z, 0), 0)


def jumprelu(generator: torch.Generator, d: int = D, f: int = F) -> dict[str, torch.Tensor]:
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,), "threshold": (f,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "threshold": made["threshold"].abs() / 2}


SPELLINGS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "sae-lens": lambda s: s,
    "linear layers": lambda s: {
        "encoder.weight": s["W_enc"].T,
        "encoder.bias": s["b_enc"],
        "decoder.weight": s["W_dec"].T,
        "decoder.bias": s["b_dec"],
        "threshold": s["threshold"],
    },
    "prefixed": lambda s: {f"module.sae.{name}": value for name, value in s.items()},
    "logarithms": lambda s: {**{k: v for k, v in s.items() if k != "threshold"}, "log_threshold": s["threshold"].log()},
    "both transposed": lambda s: {**s, "W_enc": s["W_enc"].T, "W_dec": s["W_dec"].T},
    "as a dictionary": lambda s: {
        "w_enc": s["W_enc"],
        "dictionary": s["W_dec"],
        "latent_bias": s["b_enc"],
        "pre_bias": s["b_dec"],
        "jumprelu.threshold": s["threshold"],
    },
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bare_weights(x: torch.Tensor, generator: torch.Generator, tmp_path: Path, spelling: str, suffix: str) -> None:
    """Whatever names and transposes JumpReLU weights come in: the codes are those of the formula."""
    state = jumprelu(generator)
    saved = {name: value.contiguous() for name, value in SPELLINGS[spelling](state).items()}
    path = tmp_path / f"layer_9{suffix}"
    if suffix == ".safetensors":
        save_file(saved, path)
    elif suffix == ".pt":
        torch.save({"step": 3, "state_dict": saved}, path)
    else:
        np.savez(path, **{name: value.numpy() for name, value in saved.items()})
    for where in (path, tmp_path):
        atoms = load_atoms(where)
        expected = reference({k: v.numpy() for k, v in state.items()}, x.numpy(), subtract=False)
        torch.testing.assert_close(atoms.encode(x), torch.from_numpy(expected))
        assert atoms.aip.n == 0 and torch.equal(atoms.aip.metric, torch.eye(D, dtype=torch.float64))
    with pytest.raises(ValueError, match="these atoms carry no metric: give one"):
        evaluate(atoms, x)


def test_missing_biases_and_one_threshold(x: torch.Tensor, generator: torch.Generator, tmp_path: Path) -> None:
    state = jumprelu(generator)
    del state["b_dec"]
    save_file({**state, "threshold": torch.tensor([0.3])}, tmp_path / "w.safetensors")
    full = {**state, "b_dec": torch.zeros(D), "threshold": torch.full((F,), 0.3)}
    expected = reference({k: v.numpy() for k, v in full.items()}, x.numpy(), subtract=False)
    torch.testing.assert_close(load_atoms(tmp_path / "w.safetensors").encode(x), torch.from_numpy(expected))


def test_square_matrices_go_by_their_names(generator: torch.Generator, tmp_path: Path) -> None:
    state = jumprelu(generator, 5, 5)
    x = torch.randn(20, 5, generator=generator)
    expected = torch.from_numpy(reference({k: v.numpy() for k, v in state.items()}, x.numpy(), subtract=False))
    for number, spelling in enumerate(("sae-lens", "linear layers")):
        path = tmp_path / f"{number}.safetensors"
        save_file({k: v.contiguous() for k, v in SPELLINGS[spelling](state).items()}, path)
        torch.testing.assert_close(load_atoms(path).encode(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, r"no threshold, found: .*W_enc \(6, 10\)"),
        ({"W_dec": None, "threshold": None}, "no W_dec and no threshold, found:"),
        ({"W_skip": torch.eye(D)}, r"tensor 'W_skip' is unknown, found: .*W_skip \(6, 6\)"),
        ({"sae.W_enc": torch.zeros(D, F)}, "tensor 'sae.W_enc' is given twice"),
        ({"W_dec": torch.zeros(F, D + 1)}, "shapes do not tell width from number of atoms"),
        ({"b_enc": torch.zeros(F + 1)}, "shapes do not tell width from number of atoms"),
        ({"threshold": -torch.ones(F)}, "thresholds are negative, say threshold='log' or threshold='plain'"),
        ({"b_dec": torch.full((D,), math.nan)}, "holds NaN or infinite weights"),
    ],
)
def test_what_cannot_be_told_is_refused(
    generator: torch.Generator, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = {k: v for k, v in {**jumprelu(generator), **change}.items() if v is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_atoms(tmp_path / "w.safetensors")


def test_nothing_known_lists_what_is_there(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="holds no dictionary of a known kind, there is: a.safetensors, b.pt"):
        load_atoms(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="b.pt' cannot be read"):
        load_atoms(tmp_path)
    (tmp_path / "log.txt").write_text("of a run")
    with pytest.raises(ValueError, match="log.txt' is not a file of weights, allowed are .safetensors, .npz"):
        load_atoms(tmp_path / "log.txt")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-here"),))


def test_torch_files_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"W_enc": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt' is refused: it holds something other than tensors and numbers"):
        load_atoms(tmp_path / "w.pt")
    assert not Path("was-here").exists()
    np.savez(tmp_path / "w.npz", W_enc=np.array([Malicious()], dtype=object))
    with pytest.raises(ValueError, match="w.npz' cannot be read"):
        load_atoms(tmp_path / "w.npz")
    assert not Path("was-here").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: cfg["metadata"].update(to_dict="x"), "would replace a method|would replace a part"),
        (
            lambda cfg: cfg["metadata"].update(model_from_pretrained_kwargs={"trust_remote_code": True}),
            "has trust_remote_code",
        ),
        (lambda cfg: cfg.pop("d_in"), "lacks or garbles|is not an SAE that sae-lens loads"),
        (lambda cfg: cfg.update(architecture="none"), "lacks or garbles|is not an SAE that sae-lens loads"),
        (lambda cfg: cfg.update(d_sae=7), "is not an SAE that sae-lens loads"),
        (lambda cfg: cfg.update(dtype=3), "Invalid dtype: 3"),
    ],
)
def test_hostile_sae_lens_folders(
    generator: torch.Generator, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    """Folders that do not claim to be ours are checked for what could do harm, and fail in one sentence."""
    randomised(JumpReLUSAE(JumpReLUSAEConfig(D, F)), generator).save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    change(cfg)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=message) as refused:
        load_atoms(tmp_path)
    assert "\n" not in str(refused.value)


def test_hostile_weights(generator: torch.Generator, tmp_path: Path) -> None:
    sae = randomised(JumpReLUSAE(JumpReLUSAEConfig(D, F)), generator)
    sae.b_dec.data[0] = math.inf
    sae.save_model(tmp_path / "infinite")
    with pytest.raises(ValueError, match="holds NaN or infinite weights"):
        load_atoms(tmp_path / "infinite")
    (tmp_path / "infinite" / "sae_weights.safetensors").unlink()
    os.mkfifo(tmp_path / "infinite" / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="is not a regular file"):
        load_atoms(tmp_path / "infinite")
    circular: dict[str, Any] = {}
    circular["again"] = circular
    torch.save(circular, tmp_path / "circular.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_atoms(tmp_path / "circular.pt")
    torch.save({"W_enc": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match="tensor W_enc is larger than what is stored of it"):
        load_atoms(tmp_path / "endless.pt")
    np.savez_compressed(tmp_path / "bomb.npz", W_enc=np.zeros((4000, 4000), dtype=np.float32))
    with pytest.raises(ValueError, match="bytes unpack to 64000"):
        load_atoms(tmp_path / "bomb.npz")
    save_file({**jumprelu(generator), "threshold": torch.ones(F, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="threshold is torch.int64, allowed are float64"):
        load_atoms(tmp_path / "whole.safetensors")


def test_layers_by_number() -> None:
    names = ["blocks.2.hook_resid_post", "blocks.12.hook_resid_post", "blocks.12.hook_resid_post/seed-2"]
    assert matching(names, "2") == names[:1] and matching(names, "12") == names[1:2]
    assert matching(names, names[2]) == names[2:] and matching(names, None) == sorted(names[:2])
    assert matching(["gemma-2-2b/layer_12/width_16k/params.npz"], "2") == []
    assert matching(["tsae_16k/layer_9.safetensors", "tsae_9k/layers.16"], "9") == ["tsae_16k/layer_9.safetensors"]


def test_sae_lens_folders(x: torch.Tensor, generator: torch.Generator, tmp_path: Path) -> None:
    """JumpReLU and ReLU become atoms whose codes are the same; TopK stays what it is."""
    for cls, cfg in (
        (JumpReLUSAE, JumpReLUSAEConfig(D, F)),
        (StandardSAE, StandardSAEConfig(D, F, apply_b_dec_to_input=False)),
    ):
        sae = randomised(cls(cfg), generator)
        folder = tmp_path / cls.__name__
        sae.save_model(folder)
        atoms = load_atoms(folder)
        assert isinstance(atoms, TSAE) and torch.equal(atoms.encode(x), sae.encode(x))
        assert torch.equal(atoms(x), sae(x))
        atoms.save_model(tmp_path / f"{cls.__name__}-atoms")
        assert torch.equal(load_atoms(tmp_path / f"{cls.__name__}-atoms").encode(x), sae.encode(x))
    randomised(TopKSAE(TopKSAEConfig(D, F, k=2)), generator).save_model(tmp_path / "topk")
    with pytest.raises(ValueError, match="architecture is 'topk'"):
        load_atoms(tmp_path / "topk")
    normalising = randomised(JumpReLUSAE(JumpReLUSAEConfig(D, F, normalize_activations="layer_norm")), generator)
    normalising.save_model(tmp_path / "normalising")
    with pytest.raises(ValueError, match="normalize_activations is 'layer_norm', allowed for atoms is 'none'"):
        load_atoms(tmp_path / "normalising")


def test_convert(
    x: torch.Tensor, generator: torch.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To an sae-lens folder: ours in another dtype with its metric, others under sae-lens' names."""
    state = jumprelu(generator)
    save_file({**state, "threshold": state["threshold"].log()}, tmp_path / "w.safetensors")
    out = convert(tmp_path / "w.safetensors", tmp_path / "plain", threshold="log")
    sae = SAE.load_from_disk(out)
    expected = reference({k: v.numpy() for k, v in state.items()}, x.numpy(), subtract=False)
    torch.testing.assert_close(sae.encode(x), torch.from_numpy(expected))
    ours = Path(__file__).parent / "artifacts" / "format-1" / "run"
    assert main(["convert", str(ours), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "jumprelu, 12 x 16, bfloat16" in capsys.readouterr().out
    half, whole = load_atoms(tmp_path / "half"), load_atoms(ours)
    assert torch.equal(half.W_dec, whole.W_dec.bfloat16())
    assert torch.equal(half.aip.eigenvectors, whole.aip.eigenvectors)
    assert main(["convert", str(ours), str(tmp_path / "half")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "new")]) == 2
    assert "no atoms at" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["convert", str(ours), str(tmp_path / "new"), "--dtype", "int8"]) == 2
    assert "dtype is 'int8', allowed are float32" in capsys.readouterr().err and not (tmp_path / "new").exists()
