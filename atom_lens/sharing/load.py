"""Loading atoms: an sae-lens folder with the metric beside it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from torch import Tensor

from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tsae import AIP_FILENAME, ARCHITECTURE, TSAE

Answer = TypeVar("Answer")


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


def load_atoms(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    hook: str | None = None,
    revision: str | None = None,
) -> TSAE:
    """Atoms and their metric from an atoms folder, a run folder, or a repository on the Hugging Face Hub.

    Args:
        path: a folder with cfg.json and aip.safetensors, a run folder of such folders, or "user/name" on the Hub.
        device: where the atoms go.
        dtype: of the weights, e.g. "bfloat16"; None keeps theirs. The metric stays float64.
        hook: which atoms, a name or a glob that one hook matches; needed when there are several.
        revision: branch, tag or commit of a repository.

    Raises:
        FileNotFoundError: no atoms there.
        ValueError: several hooks and none chosen, files that do not fit together, or no such repository.
    """
    folder = atoms_folder(path, hook, revision)
    atoms = SAE.load_from_disk(folder, device=device, dtype=dtype, converter=aip_converter)
    assert isinstance(atoms, TSAE)
    return atoms


def atoms_folder(path: str | Path, hook: str | None = None, revision: str | None = None) -> Path:
    """The sae-lens folder at `path`: itself, or the one of `hook` in a run folder or a repository on the Hub."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return _from_hub(str(path), hook, revision)
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {str(path)!r} is a folder: only a repository has revisions")
    if (folder / SAE_CFG_FILENAME).is_file():
        return folder
    return folder / _chosen(str(path), hook, [cfg.parent.name for cfg in folder.glob(f"*/{SAE_CFG_FILENAME}")])


def _from_hub(repo_id: str, hook: str | None, revision: str | None) -> Path:
    """The folder of `hook` in a repository, in the Hub's cache; only what loading needs is downloaded."""
    names = _asked(repo_id, revision, lambda: HfApi().list_repo_files(repo_id, revision=revision))
    hooks = [name.split("/")[0] for name in names if re.fullmatch(f"[^/]+/{SAE_CFG_FILENAME}", name)]
    chosen = "" if SAE_CFG_FILENAME in names else f"{_chosen(repo_id, hook, hooks)}/"
    wanted = [f"{chosen}{name}" for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, AIP_FILENAME)]
    return Path(_asked(repo_id, revision, lambda: _downloaded(repo_id, revision, wanted))) / chosen


def _downloaded(repo_id: str, revision: str | None, wanted: list[str]) -> str:
    return snapshot_download(repo_id, revision=revision, allow_patterns=wanted)


def _asked(repo_id: str, revision: str | None, ask: Callable[[], Answer]) -> Answer:
    """What the Hub answers; whatever keeps it from that is one sentence."""
    try:
        return ask()
    except Exception as error:  # the client raises errors of its HTTP library as they are, and that changes
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id!r} is neither a folder nor a repository that the Hub gives{at}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def _chosen(where: str, hook: str | None, hooks: list[str]) -> str:
    """The one of `hooks` that `hook` names, or matches as a glob."""
    if not hooks:
        raise FileNotFoundError(f"no atoms at {where!r}: neither {SAE_CFG_FILENAME} nor folders that hold one")
    fitting = sorted(fnmatch.filter(hooks, hook or "*"))
    if not fitting:
        raise ValueError(f"hook {hook!r} is not in {where!r}, allowed are {', '.join(sorted(hooks))}")
    if len(fitting) > 1:
        raise ValueError(f"{where!r} holds atoms of {len(fitting)} hooks, choose hook= of {', '.join(fitting)}")
    return fitting[0]
