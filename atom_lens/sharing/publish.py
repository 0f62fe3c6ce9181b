"""Publish: a run's atoms, its evidence and a card made from them, on the Hugging Face Hub in one commit."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from atom_lens.sharing.card import merged_card, run_card
from atom_lens.tsae import AIP_FILENAME

# What is published of a folder of atoms; anything else that lies there stays at home.
_ATOMS = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    AIP_FILENAME,
    "identity.safetensors",
    "report.json",
)
_RUN = ("recipe.yaml", "report.json")


@dataclass(frozen=True)
class Published:
    """What was, or with `dry_run` would be, published.

    Attributes:
        url: of the commit; None for a dry run.
        files: path in the repository -> bytes.
        card: the README.md.
    """

    url: str | None
    files: dict[str, int]
    card: str


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    hooks: Sequence[str] = (),
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Published:
    """Publish a run folder as a model repository that sae-lens, and `load_atoms`, read from.

    One commit holds all layers and seeds. Large files go first: a publish that was cut off leaves the repository at its
    old commit, and the next one sends only what is not there yet. A README.md of the repository is merged: its text and
    its metadata stay, the part that this function wrote is replaced.

    Args:
        folder: of `train`, with atoms, report.json and recipe.yaml.
        repo_id: "user/name"; created where it does not exist.
        hooks: names or globs of the hooks to publish; all if empty.
        private: for a repository that is created now.
        dry_run: say what would be published, ask nothing of the Hub and change nothing.
        token: of the Hub; None takes the one that ``hf auth login`` keeps.

    Raises:
        FileNotFoundError: no run at `folder`.
        ValueError: no such hook, a name that is not "user/name", or a Hub that refuses.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}, allowed is 'user/name': {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {repo_id!r}, allowed is 'user/name'")
    files = _files(folder, hooks)
    reports = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if name.endswith("/report.json")
    }
    card = run_card(reports, repo_id)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return Published(None, sizes, card)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        try:
            old = Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
        except EntryNotFoundError:
            old = None
        card = merged_card(card, old)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        found = api.create_commit(repo_id, operations, commit_message=f"Publish {folder.name}")
    except Exception as error:  # the client raises errors of its HTTP library as they are, and that changes
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{repo_id!r} was not published and is as it was before: {said}") from error
    return Published(str(found.commit_url), sizes, card)


def _files(folder: Path, hooks: Sequence[str]) -> dict[str, Path]:
    """Path in the repository -> file, of the chosen hooks and their seeds."""
    available = sorted(path.parent.name for path in folder.glob(f"*/{SAE_CFG_FILENAME}"))
    if not available:
        raise FileNotFoundError(f"no run at {str(folder)!r}: no folder in it holds {SAE_CFG_FILENAME}")
    for pattern in hooks:
        if not fnmatch.filter(available, pattern):
            raise ValueError(f"hook {pattern!r} is not in {str(folder)!r}, allowed are {', '.join(available)}")
    chosen = [name for name in available if not hooks or any(fnmatch.fnmatch(name, pattern) for pattern in hooks)]
    files = {name: folder / name for name in _RUN if (folder / name).is_file()}
    for hook in chosen:
        for atoms in (folder / hook, *sorted((folder / hook).glob("seed-*"))):
            for name in _ATOMS:
                if (atoms / name).is_file():
                    files[(atoms / name).relative_to(folder).as_posix()] = atoms / name
    return files
