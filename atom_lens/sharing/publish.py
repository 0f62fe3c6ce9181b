"""Publish: a run's atoms, its evidence and a model card, on the Hugging Face Hub in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from atom_lens.dictionaries.folder import AIP_FILENAME, WITHIN
from atom_lens.dictionaries.load import matching
from atom_lens.errors import AtomLensError
from atom_lens.evidence.results import Report
from atom_lens.recipe.reading import load_recipe
from atom_lens.sharing.card import FIGURE, merged_card, run_card
from atom_lens.storage.files import without_secrets
from atom_lens.storage.sealed import MANIFEST, verify
from atom_lens.storage.terminal import say
from atom_lens.studies.train.show import evidence
from atom_lens.views.plot import save_png

# What is published of a folder of atoms; anything else in it stays local.
_ATOMS = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    AIP_FILENAME,
    "identity.safetensors",
    "report.json",
    MANIFEST,
)
_RUN = ("recipe.yaml", "report.json", MANIFEST)


@dataclass(frozen=True)
class Published:
    """What was published, or would be without `dry_run`.

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
    license: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> Published:
    """Publish a run folder as a model repository that sae-lens, and `load_atoms`, read from.

    One commit holds all layers and seeds. Large files are sent first: an interrupted publish leaves the repository at
    its old commit (or, if only the answer was lost, at the new one), and the next one sends only what is missing. A
    README.md of the repository is merged: its text and metadata stay, and the part that this function wrote is
    replaced. Files that an earlier publish wrote for the same hooks and that this run lacks are removed.

    Args:
        folder: a run folder of `train`, with atoms, report.json and recipe.yaml.
        repo_id: "user/name"; created if it does not exist.
        hooks: names, globs or layer numbers of the hooks to publish; all if empty.
        private: whether a repository that is created now is private.
        license: of the atoms, as the Hub abbreviates it ("mit"); None keeps what the repository says.
        dry_run: only return what would be published; the Hub is not asked and nothing changes.
        token: of the Hub; None takes the one that ``hf auth login`` stored.

    Raises:
        FileNotFoundError: no run at `folder`.
        AtomLensError: files that changed since the run wrote them, no such hook, a name that is not "user/name", or a
            refusal by the Hub.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AtomLensError(f"repo_id is {repo_id!r}, allowed is 'user/name': {error}") from error
    if repo_id.count("/") != 1:
        raise AtomLensError(f"repo_id is {repo_id!r}, allowed is 'user/name'")
    files = _files(folder, hooks)
    reports = {
        name[: -len("/report.json")]: Report.read(p) for name, p in files.items() if name.endswith("/report.json")
    }
    recipe = load_recipe(folder / "recipe.yaml") if "recipe.yaml" in files else None
    card = run_card(reports, repo_id, recipe, license)
    with tempfile.TemporaryDirectory() as figures:
        for number, (hook, report) in enumerate(reports.items()):
            files[f"{hook}/{FIGURE}"] = Path(figures) / f"{number}.png"
            save_png(list(evidence(report).items()), files[f"{hook}/{FIGURE}"], hook)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if dry_run:
            return Published(None, sizes, card)
        url, card = _commit(HfApi(token=token), repo_id, files, card, private, f"Publish {folder.name}")
    return Published(url, sizes, card)


def _commit(
    api: HfApi, repo_id: str, files: dict[str, Path], card: str, private: bool, message: str
) -> tuple[str, str]:
    """Commit `files` and the card, merged with an existing README; returns the commit's URL and the merged card."""
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        # The commit builds on the state that is read here: a change by somebody else meanwhile is an error, not lost.
        parent = api.repo_info(repo_id).sha
        there = api.list_repo_files(repo_id, revision=parent)
        old = None
        if "README.md" in there:
            old = Path(api.hf_hub_download(repo_id, "README.md", revision=parent)).read_text(encoding="utf-8")
        card = merged_card(card, old)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, path) for name, path in files.items()
        ]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        operations += [CommitOperationDelete(name) for name in there if _stale(name, files)]
        found = api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent)
    except Exception as error:  # the client passes on errors of its HTTP library, which has changed before
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = without_secrets(said, api.token if isinstance(api.token, str) else get_token())
        raise AtomLensError(f"publishing to {repo_id!r} did not complete, try again: {said}") from None
    return str(found.commit_url), card


def _stale(name: str, files: dict[str, Path]) -> bool:
    """Whether an earlier publish wrote this file for a hook that is published now, and the run no longer has it."""
    parts = name.split("/")
    ours = len(parts) in (2, 3) and f"{parts[0]}/{SAE_CFG_FILENAME}" in files and parts[-1] in (*_ATOMS, FIGURE)
    return ours and name not in files and (len(parts) == 2 or parts[1].startswith(WITHIN))


def _files(folder: Path, hooks: Sequence[str]) -> dict[str, Path]:
    """Path in the repository -> file, for the chosen hooks and their seeds; each was checked against its manifest."""
    available = sorted(path.parent.name for path in folder.glob(f"*/{SAE_CFG_FILENAME}"))
    if not available or not (folder / "recipe.yaml").exists():
        lacks = "no folder in it holds atoms" if not available else "it has no recipe.yaml"
        raise FileNotFoundError(f"no run at {str(folder)!r}: {lacks}")
    for pattern in hooks:
        if not matching(available, pattern):
            raise AtomLensError(f"hook {pattern!r} is not in {str(folder)!r}, allowed are {', '.join(available)}")
    wanted = {name for pattern in hooks or ["*"] for name in matching(available, pattern)}
    files: dict[str, Path] = {}
    folders = [(folder, _RUN)]
    for hook in sorted(wanted):
        within = [one for one in sorted((folder / hook).iterdir()) if one.is_dir() and one.name.startswith(WITHIN)]
        folders += [(atoms, _ATOMS) for atoms in (folder / hook, *within)]
    for place, names in folders:
        listed = {*verify(place), MANIFEST}
        files |= {(place / n).relative_to(folder).as_posix(): place / n for n in names if n in listed}
    return files


def command(
    run: str,
    repo: str,
    /,
    *,
    hook: Annotated[list[str], Parameter(alias="--layer")] = [],  # noqa: B006 -- read only
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish a run on the Hugging Face Hub: atoms, evidence and a card, in one commit.

    Example: atom-lens publish runs/cities-16k me/gemma-atoms --layer 9 --dry-run

    Args:
        run: run folder
        repo: user/name, created if it does not exist
        hook: layer number, name or glob of a hook; may be repeated (default: all)
        license: of the atoms, as the Hub abbreviates it, e.g. mit
        private: make a repository that is created now private
        dry_run: only show what would be published
    """
    found = publish(run, repo, hooks=hook, private=private, license=license, dry_run=dry_run)
    total = sum(found.files.values())
    lines = [f"{size:>12,}  {name}" for name, size in found.files.items()]
    lines.append(f"{total:>12,}  bytes in {len(found.files)} files, and README.md{'' if found.url else ':'}")
    lines.append(f"published: {found.url}" if found.url else f"\n{found.card}\nnothing was published (dry run)")
    say("\n".join(lines))
