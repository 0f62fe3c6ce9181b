"""Loading atoms: an sae-lens folder with the metric beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from torch import Tensor

from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tsae import AIP_FILENAME, ARCHITECTURE, TSAE


def aip_converter(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Upgrade a ``jumprelu`` folder to a `TSAE` with its metric.

    For sae-lens' own loading: ``SAE.load_from_disk(path, converter=aip_converter)``.
    """
    cfg, state = sae_lens_disk_loader(path, device, cfg_overrides)
    aip = AtomicInnerProduct.load(Path(path) / AIP_FILENAME)
    if cfg["architecture"] not in ("jumprelu", ARCHITECTURE):
        raise ValueError(
            f"architecture of {str(path)!r} is {cfg['architecture']!r}, allowed are jumprelu, {ARCHITECTURE}"
        )
    if aip.width != cfg["d_in"]:
        raise ValueError(f"{path}: the metric has width {aip.width}, the weights have d_in {cfg['d_in']}")
    cfg["architecture"] = ARCHITECTURE
    cfg["metadata"] = {
        **cfg.get("metadata", {}),
        "aip": {"n": aip.n, "ridge": aip.ridge, "source": aip.source},
    }
    state["aip_eigenvalues"], state["aip_eigenvectors"] = (
        aip.eigenvalues.to(device),
        aip.eigenvectors.to(device),
    )
    return cfg, state


def load_atoms(path: str | Path, device: str = "cpu", dtype: str | None = None, hook: str | None = None) -> TSAE:
    """Atoms and their metric from an atoms folder, or from a run folder.

    Args:
        path: a folder with cfg.json and aip.safetensors, or a run folder that holds such folders.
        device: where the atoms go.
        dtype: of the weights, e.g. "bfloat16"; None keeps theirs. The metric stays float64.
        hook: which atoms of a run folder; needed when there is more than one hook.

    Raises:
        FileNotFoundError: no atoms there.
        ValueError: several hooks and none chosen, or files that do not fit together.
    """
    folder = atoms_folder(path, hook)
    atoms = SAE.load_from_disk(folder, device=device, dtype=dtype, converter=aip_converter)
    assert isinstance(atoms, TSAE)
    return atoms


def atoms_folder(path: str | Path, hook: str | None = None) -> Path:
    """The sae-lens folder at `path`: itself, or the one of `hook` in a run folder."""
    folder = Path(path)
    if not (folder / SAE_CFG_FILENAME).is_file():
        hooks = sorted(cfg.parent.name for cfg in folder.glob(f"*/{SAE_CFG_FILENAME}"))
        if not hooks:
            raise FileNotFoundError(f"no atoms at {str(path)!r}: neither {SAE_CFG_FILENAME} nor folders that hold one")
        if hook is None and len(hooks) > 1:
            raise ValueError(f"{str(path)!r} holds atoms of {len(hooks)} hooks, choose hook= of {', '.join(hooks)}")
        if hook is not None and hook not in hooks:
            raise ValueError(f"hook {hook!r} is not in {str(path)!r}, allowed are {', '.join(hooks)}")
        return folder / (hook or hooks[0])
    return folder
