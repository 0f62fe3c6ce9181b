"""Dictionaries that other libraries saved, as sae-lens SAEs: sae-lens, sparsify, dictionary_learning, bare weights.

`foreign_converter` has the signature of sae-lens' own disk loaders: ``SAE.load_from_disk(path, converter=...)``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, StandardSAE, __version__
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

from atom_lens.dictionaries.folder import check_metadata
from atom_lens.dictionaries.metered import WHITENED
from atom_lens.dictionaries.tsae.sae import ARCHITECTURE, TSAE, TSAEConfig, model_metadata
from atom_lens.dictionaries.weights import WEIGHTS, State, Thresholds, jumprelu_weights, read_tensors
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import read_json, regular_file, shown

logger = logging.getLogger(__name__)


def foreign_converter(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    threshold: Thresholds = "auto",
) -> tuple[dict[str, Any], State]:
    """Config and weights of a dictionary that another library saved, in sae-lens' names.

    Args:
        path: a folder of sae-lens, sparsify or dictionary_learning, or a file of JumpReLU weights.
        device, cfg_overrides: as sae-lens' loaders take them.
        threshold: whether bare weights hold thresholds or their logarithms; "auto" goes by the name.

    Raises:
        AtomLensError: there is nothing of a known kind; the message says what there is.
    """
    path = Path(path)
    try:
        return _converted(path, device, cfg_overrides or {}, threshold)
    except (KeyError, TypeError, AttributeError) as error:
        raise AtomLensError(f"{str(path)!r} lacks or garbles what its library writes: {shown(str(error))}") from error


def _converted(
    path: Path, device: str, overrides: dict[str, Any], threshold: Thresholds
) -> tuple[dict[str, Any], State]:
    if path.is_dir() and (path / SAE_WEIGHTS_FILENAME).exists():
        regular_file(path / SAE_WEIGHTS_FILENAME)
        metadata = read_json(path / SAE_CFG_FILENAME).get("metadata", {})
        check_metadata(metadata)
        if "trust_remote_code" in (metadata.get("model_from_pretrained_kwargs") or {}):
            raise AtomLensError(f"{str(path)!r}: metadata.model_from_pretrained_kwargs has trust_remote_code")
        cfg, state = sae_lens_disk_loader(path, device, overrides)
        if cfg.get("normalize_activations") == WHITENED:
            raise AtomLensError(
                f"{str(path)!r} is a checkpoint from the middle of training: it is wrong on raw activations"
            )
        _check_finite(path, state)
        return cfg, state
    if path.is_dir() and (path / "sae.safetensors").exists():
        cfg, state = _sparsify(path)
    elif path.is_dir() and (path / "ae.pt").exists():
        cfg, state = _dictionary_learning(path)
    else:
        cfg, state = _bare(path, threshold)
    made = _config(path, cfg, state)
    return {**made, "device": device, **overrides}, {k: v.to(device) for k, v in state.items()}


def as_tsae(sae: SAE[Any]) -> TSAE:
    """The same dictionary as a `TSAE`, weights untouched, with the identity as its metric.

    Raises:
        AtomLensError: it has no thresholds: only JumpReLU SAEs, and ReLU SAEs whose threshold is 0, are TSAEs.
    """
    if isinstance(sae, TSAE):
        return sae
    name = sae.cfg.architecture()
    if not isinstance(sae, JumpReLUSAE | StandardSAE):
        raise AtomLensError(
            f"architecture is {name!r}, atoms are jumprelu or standard: SAE.load_from_disk reads this one"
        )
    cfg = sae.cfg.to_dict()
    if (norm := cfg["normalize_activations"]) != "none":
        raise AtomLensError(f"normalize_activations is {norm!r}, allowed for atoms is 'none'")
    state = {k: v.detach() for k, v in sae.state_dict().items()}
    state.setdefault("threshold", torch.zeros_like(state["b_enc"]))
    metadata = {**cfg["metadata"], "converted_from": name, "aip": None}
    if metadata.get("model_from_pretrained_kwargs"):
        logger.warning("model_from_pretrained_kwargs is left out: %s", sae.cfg.metadata.model_from_pretrained_kwargs)
    metadata["model_from_pretrained_kwargs"] = {}
    # On the meta device at first: no weights are drawn or copied, the given ones are used.
    atoms = TSAE(TSAEConfig.from_dict({**cfg, "metadata": metadata, "architecture": ARCHITECTURE, "device": "meta"}))
    atoms.process_state_dict_for_loading(state)
    atoms.load_state_dict(state, assign=True)
    return atoms.to(device=str(sae.W_dec.device))


def _config(path: Path, cfg: dict[str, Any], state: State) -> dict[str, Any]:
    _check_finite(path, state)
    metadata = {"sae_lens_version": __version__, **model_metadata(), **cfg.pop("metadata", {})}
    dtype = str(state["W_enc"].dtype).removeprefix("torch.")
    d, f = state["W_enc"].shape
    shared = {"d_in": d, "d_sae": f, "dtype": dtype, "normalize_activations": "none", "reshape_activations": "none"}
    return {**shared, "metadata": metadata, **cfg}


def _check_finite(path: Path, state: State) -> None:
    if any(not torch.isfinite(value).all() for value in state.values()):
        raise AtomLensError(f"{str(path)!r} holds NaN or infinite weights")


def open_sae(folder: Path, converter: Any, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """`SAE.load_from_disk`; any failure to load is an AtomLensError of one sentence."""
    try:
        return SAE.load_from_disk(folder, device=device, dtype=dtype, converter=converter)
    except (ValueError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # sae-lens checks nothing: a fault may show anywhere
        raise AtomLensError(f"{str(folder)!r} is not an SAE that sae-lens loads: {shown(str(error))}") from error


def _sparsify(path: Path) -> tuple[dict[str, Any], State]:
    """EleutherAI sparsify: TopK, one folder per hook point of transformers."""
    about, found = read_json(path / SAE_CFG_FILENAME), read_tensors(path / "sae.safetensors")
    for key, allowed in (("transcode", False), ("skip_connection", False), ("activation", "topk"), ("signed", False)):
        if about.get(key, allowed) != allowed:
            raise AtomLensError(f"{str(path)!r}: {key} is {about[key]!r}, allowed is {allowed!r}")
    run = path.parent / "config.json"
    model = read_json(run).get("model") if run.exists() else None
    layer = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?", path.name)
    hook = f"blocks.{layer[1]}.{'hook_mlp_out' if layer[2] else 'hook_resid_post'}" if layer else None
    cfg = {
        "architecture": "topk",
        "k": about["k"],
        "apply_b_dec_to_input": True,
        "metadata": {"model_name": model, "hook_name": hook},
    }
    return cfg, jumprelu_weights(found, path, thresholds=False)


def _dictionary_learning(path: Path) -> tuple[dict[str, Any], State]:
    """dictionary_learning: ``ae.pt`` and ``config.json`` in one folder."""
    trainer = read_json(path / "config.json").get("trainer", {})
    kind, found = trainer.get("dict_class"), read_tensors(path / "ae.pt")
    k, groups = found.pop("k", None), found.pop("group_sizes", None)
    cfg: dict[str, Any] = {
        # dictionary_learning subtracts the decoder's bias, except in two of its classes.
        "apply_b_dec_to_input": kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
        "metadata": {
            "model_name": trainer.get("lm_name"),
            "hook_name": _dictionary_learning_hook(trainer),
        },
    }
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return {**cfg, "architecture": "standard"}, jumprelu_weights(found, path, thresholds=False)
    if kind == "AutoEncoderTopK":
        found.pop("threshold", None)
        chosen = trainer["k"] if k is None else int(k)
        return {**cfg, "architecture": "topk", "k": chosen}, jumprelu_weights(found, path, thresholds=False)
    if kind == "JumpReluAutoEncoder" or (kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")):
        if groups is None and kind == "MatryoshkaBatchTopKSAE":
            raise AtomLensError(f"{str(path)!r}: group_sizes is missing")
        if "threshold" in found and found["threshold"].ndim == 0 and found["threshold"] < 0:
            raise AtomLensError(f"{str(path)!r}: threshold is {float(found['threshold'])}: it was never trained")
        return {**cfg, "architecture": "jumprelu"}, jumprelu_weights(found, path, threshold="plain")
    if kind == "GatedAutoEncoder":
        gates = {"b_gate": found.pop("gate_bias"), "r_mag": found.pop("r_mag"), "b_mag": found.pop("mag_bias")}
        state = jumprelu_weights({**found, "b_enc": gates["b_gate"]}, path, thresholds=False)
        del state["b_enc"]
        return {**cfg, "architecture": "gated"}, {**state, **gates}
    raise AtomLensError(f"{str(path)!r}: trainer.dict_class is {kind!r}, which is not a class that sae-lens has")


def _dictionary_learning_hook(trainer: dict[str, Any]) -> str | None:
    """The residual stream after its layer, unless another submodule may be meant."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name") or "resid_post"
    return f"blocks.{layer}.hook_resid_post" if layer is not None and str(submodule).startswith("resid_post") else None


def _bare(path: Path, threshold: Thresholds) -> tuple[dict[str, Any], State]:
    """A file of JumpReLU weights, or a folder with one such file."""
    if path.is_file() and path.suffix not in WEIGHTS:
        raise AtomLensError(f"{str(path)!r} is not a file of weights, allowed are {', '.join(WEIGHTS)}")
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in WEIGHTS)
    if len(files) != 1:
        there = ", ".join(sorted(p.name for p in path.glob("*"))[:12]) if path.is_dir() else "no folder"
        raise AtomLensError(f"{str(path)!r} holds no dictionary of a known kind, there is: {there or 'nothing'}")
    state = jumprelu_weights(read_tensors(files[0]), files[0], threshold)
    # In the JumpReLU paper and in Gemma Scope the encoder reads the activation as it is.
    return {"architecture": "jumprelu", "apply_b_dec_to_input": False}, state
