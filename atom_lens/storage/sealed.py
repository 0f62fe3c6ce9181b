"""Sealed folders: a manifest with the length and hash of every file, checked before a file is read (docs/format.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import (
    new_folder,
    read_json,
    regular_file,
    shown,
    sweep,
    sync_folder,
    temporary_folder,
    write_json,
)
from atom_lens.storage.schema import Strict, parsed

MANIFEST = "manifest.json"
LOG = "log.txt"
FORMAT = 1

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=255)]


class _File(Strict):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Strict):
    """`manifest.json`: the schema version, and every file directly in its folder."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    files: dict[_Name, _File]


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of the files `names` in `folder`; other files there are not part of it."""
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in sorted(names)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files become those of `path`, sealed: all of them or, on failure, none.

    If `path` exists, files are moved in one by one, the manifest last: a process killed meanwhile leaves a seal that
    does not fit. The new manifest lists nothing that was there before.
    """
    if not path.is_dir():
        with new_folder(path) as temporary:
            yield temporary
            seal(temporary, [file.name for file in temporary.iterdir()])
        return
    sweep(path, "staged")
    with temporary_folder(path / "staged") as temporary:
        yield temporary
        seal(temporary, [file.name for file in temporary.iterdir()])
        sync_folder(temporary)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(path / file.name)


def manifest_of(folder: Path) -> Manifest:
    """The manifest of `folder`, checked.

    Raises:
        FileNotFoundError: there is none.
        AtomLensError: it is not as docs/format.md asks.
    """
    found = read_json(folder / MANIFEST)
    if found.get("format") != FORMAT:
        raise AtomLensError(f"{str(folder / MANIFEST)!r}: format is {shown(found.get('format'))}, known is {FORMAT}")
    return parsed(Manifest, found, folder / MANIFEST)


def verify(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Check `names`, or all files of the manifest, against their lengths and hashes; returns all names that it lists.

    Raises:
        FileNotFoundError: a file, or the manifest, is missing.
        AtomLensError: the manifest does not list a file, or a file has changed since it was written.
    """
    files = manifest_of(folder).files
    for name in files if names is None else names:
        if name not in files:
            raise AtomLensError(f"{str(folder / MANIFEST)!r} does not list {name}, so it cannot be trusted")
        path = folder / name
        size = regular_file(path)
        if size != files[name].bytes:
            raise AtomLensError(
                f"{str(path)!r} has {size} bytes, {files[name].bytes} were written: it was truncated or replaced"
            )
        if _sha256(path) != files[name].sha256:
            raise AtomLensError(f"{str(path)!r} is not what was written: its SHA-256 differs from the manifest")
    return list(files)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
