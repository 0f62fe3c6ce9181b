"""Loading atoms: from folders, repositories on the Hugging Face Hub, and releases that sae-lens knows."""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from sae_lens import SAE
from sae_lens.constants import DTYPE_TO_STR, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import Tensor

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.folder import AIP_FILENAME, ATOMS_FILES, CONFIGS, read_atoms
from atom_lens.dictionaries.foreign import as_tsae, foreign_converter, open_sae
from atom_lens.dictionaries.metered import METRIC, Metered
from atom_lens.dictionaries.tsae.sae import TSAE
from atom_lens.dictionaries.weights import WEIGHTS, Thresholds
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import read_json, without_secrets
from atom_lens.storage.sealed import MANIFEST

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_LAYER = re.compile(r"(?:^|[/._-])(?:blocks|layers?|h)[._-]?(\d+)(?![^/._-])")  # blocks.9., layer_9/, layers.9


def aip_converter(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An atoms folder, checked against docs/format.md, with its metric: a `TSAE`, a TopK or a pursuit.

    For sae-lens' own loading: ``SAE.load_from_disk(path, converter=aip_converter)``.
    """
    device = pick_device(device)
    cfg, weights, aip = read_atoms(Path(path))
    about = {"n": aip.n, "ridge": aip.ridge, "source": aip.source}
    metadata = {**cfg["metadata"], "aip": about}
    tensors = {**weights, **dict(zip(METRIC, (aip.eigenvalues, aip.eigenvectors), strict=True))}
    state = {name: value.to(device) for name, value in tensors.items()}
    overrides = cfg_overrides or {}
    return {
        **cfg,
        "device": device,
        **overrides,
        "architecture": CONFIGS[cfg["architecture"]].ours,
        "metadata": metadata,
    }, state


def load_atoms(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    hook: str | None = None,
    revision: str | None = None,
) -> Metered:
    """Load atoms and their metric.

    A folder of this package is checked against its manifest first (docs/format.md). JumpReLU and ReLU dictionaries of
    other libraries come without a metric: it is the identity until you set ``atoms.aip``.

    Args:
        path: an atoms folder, a run folder of such folders, "user/name" on the Hub, a release of sae-lens, or a folder
            or file of another library (sae-lens, dictionary_learning, bare JumpReLU weights).
        device: where to put the atoms.
        dtype: of the weights, e.g. "bfloat16"; None keeps theirs (of a release: float32). The metric stays float64.
        hook: which atoms, if there are several: a name, a glob, or the number of a layer.
        revision: branch, tag or commit of a repository.

    Raises:
        FileNotFoundError: there are no atoms.
        AtomLensError: several hooks and none chosen, atoms of another hook, an unavailable device, files that are
            damaged or do not fit together, an architecture without thresholds, or no such repository.
    """
    device = pick_device(device)
    if dtype not in (None, *DTYPE_TO_STR.values()):
        raise AtomLensError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPE_TO_STR.values())}")
    found = load_dictionary(path, device, dtype, hook, revision)
    return found if isinstance(found, Metered) else _without_metric(found, str(path))


def load_dictionary(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    hook: str | None = None,
    revision: str | None = None,
) -> SAE[Any]:
    """As `load_atoms`, for any architecture that sae-lens has; dictionaries that bring no metric have none."""
    release = None if Path(path).exists() else get_pretrained_saes_directory().get(str(path))
    if release is None:
        return open_dictionary(atoms_folder(path, hook, revision), device, dtype)
    if revision is not None:
        raise AtomLensError(
            f"revision is {revision!r}, but releases of sae-lens have no revisions: load the repository by name"
        )
    sae_id = chosen(str(path), hook, release.saes_map)
    return _asked(str(path), revision, lambda: SAE.from_pretrained(str(path), sae_id, device, dtype or "float32"))


def open_dictionary(
    folder: Path, device: str = "cpu", dtype: str | None = None, threshold: Thresholds = "auto"
) -> SAE[Any]:
    """Any dictionary on disk: ours with its metric, others as what sae-lens has for their architecture."""
    converter = aip_converter if _is_ours(folder) else partial(foreign_converter, threshold=threshold)
    return open_sae(folder, converter, device, dtype)


def _is_ours(folder: Path) -> bool:
    """Whether `folder` has any mark of this package: then it must have all of them, and they must fit."""
    if (folder / MANIFEST).exists() or (folder / AIP_FILENAME).exists():
        return True
    cfg = folder / SAE_CFG_FILENAME
    metadata = read_json(cfg).get("metadata") if cfg.exists() else None
    return isinstance(metadata, dict) and metadata.get("aip") is not None


def _without_metric(sae: SAE[Any], path: str) -> TSAE:
    atoms = as_tsae(sae)
    logger.warning("no metric came with %r: atoms.aip is the identity until you set it", path)
    return atoms


def atoms_folder(path: str | Path, hook: str | None = None, revision: str | None = None) -> Path:
    """The folder (or file) of one dictionary at `path`: itself, or the one of `hook` in a run or a repository."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return _from_hub(str(path), hook, revision)
    if revision is not None:
        raise AtomLensError(f"revision is {revision!r}, but {str(path)!r} is a folder: only a repository has revisions")
    if folder.is_file() or any((folder / name).exists() for name in (SAE_CFG_FILENAME, *ATOMS_FILES, "ae.pt")):
        _of_hook(folder, hook)
        return folder
    below = {
        file.relative_to(folder).parent.as_posix()
        for name in (SAE_CFG_FILENAME, "ae.pt")
        for file in (*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}"))
    }
    if not below and folder.is_dir() and any(file.suffix in WEIGHTS for file in folder.iterdir()):
        return folder
    return folder / chosen(str(path), hook, below)


def _of_hook(folder: Path, hook: str | None) -> None:
    """A single dictionary asked for by hook must be of that hook, by its config or its name."""
    cfg = folder / SAE_CFG_FILENAME
    metadata = read_json(cfg).get("metadata") if hook is not None and cfg.exists() else None
    said = metadata.get("hook_name") if isinstance(metadata, dict) else None
    names = [name for name in (said, folder.resolve().name) if isinstance(name, str)]
    if not any(matching([name], hook) for name in names):
        raise AtomLensError(f"hook {hook!r} is not in {str(folder)!r}, it holds one dictionary, of {names[0]!r}")


def _from_hub(repo_id: str, hook: str | None, revision: str | None) -> Path:
    """The dictionary of `hook` in a repository, in the Hub's cache; only the files needed are downloaded."""
    names = [
        PurePosixPath(n) for n in _asked(repo_id, revision, lambda: HfApi().list_repo_files(repo_id, revision=revision))
    ]
    names = [name for name in names if not name.is_absolute() and ".." not in name.parts]
    marked = {name.parent.as_posix() for name in names if name.name in (SAE_CFG_FILENAME, "ae.pt")}
    if marked:
        folder = "." if "." in marked else chosen(repo_id, hook, marked)
        needed = {*ATOMS_FILES, MANIFEST, "ae.pt", "config.json", "sae.safetensors"}
        wanted = [n for n in names if n.parent.as_posix() == folder and n.name in needed]
        above = PurePosixPath(folder).parent / "config.json"  # where sparsify keeps the model's name
        wanted += [above] if above in names and above not in wanted else []
        file = ""
    else:
        file = chosen(repo_id, hook, {n.as_posix() for n in names if n.suffix in WEIGHTS})
        folder, wanted = ".", [PurePosixPath(file)]
    patterns = [glob.escape(name.as_posix()) for name in wanted]
    local = _asked(repo_id, revision, lambda: snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    return Path(local) / folder / file


def _asked(where: str, revision: str | None, ask: Callable[[], Answer]) -> Answer:
    """The Hub's answer; any failure is an AtomLensError of one sentence."""
    try:
        return ask()
    except Exception as error:  # the client passes on errors of its HTTP library, which has changed before
        at = f" at revision {revision!r}" if revision else ""
        raise AtomLensError(
            f"{where!r} is neither a folder nor a repository that the Hub provides{at}: "
            f"{without_secrets((str(error).splitlines() or [type(error).__name__])[0])}"
        ) from error


def matching(names: Iterable[str], pattern: str | None) -> list[str]:
    """The `names` that `pattern` matches: a name, a glob, or a layer's number; other seeds only by their full name."""
    every = set(names)
    if pattern in every:
        return [pattern]
    top = sorted(n for n in every if not any(parent.as_posix() in every for parent in PurePosixPath(n).parents))
    if pattern is not None and pattern.isdecimal():
        return [name for name in top if int(pattern) in {int(number) for number in _LAYER.findall(name)}]
    return fnmatch.filter(top, pattern or "*")


def chosen(where: str, hook: str | None, hooks: Iterable[str]) -> str:
    """The one of `hooks` that `hook` matches (`matching`)."""
    hooks = list(hooks)
    if not hooks:
        raise FileNotFoundError(f"no atoms at {where!r}: no {SAE_CFG_FILENAME}, no {SAE_WEIGHTS_FILENAME}, no weights")
    fitting = matching(hooks, hook)
    if not fitting:
        raise AtomLensError(f"hook {hook!r} is not in {where!r}, allowed are {_listed(matching(hooks, None))}")
    if len(fitting) > 1:
        raise AtomLensError(f"{where!r} holds atoms of {len(fitting)} hooks, choose hook= of {_listed(fitting)}")
    return fitting[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
