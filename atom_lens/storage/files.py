"""Files that are whole or absent: written under a temporary name, synced, then renamed; and checked when read."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from atom_lens.errors import AtomLensError
from atom_lens.storage.text import read_text

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, format characters, halves of surrogate pairs, separators
_JOINERS = "\u200c\u200d"  # some scripts and emoji need them
_SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
_TEMPORARY = ".atom-lens-"  # files of this prefix are ours, and abandoned if no process is writing them


@contextmanager
def _disk_full_is_an_oserror(path: Path) -> Iterator[None]:
    """safetensors and Arrow each have their own error for a full disk; turn both into an OSError."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, "no disk space is left to write", str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and keeps their names by itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path`; it becomes `path` on success and disappears on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _disk_full_is_an_oserror(path):
            yield temporary
        # mkstemp makes files for the owner alone; give it the mode of any other new file.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a folder next to `path` that is removed afterwards, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{path.name}.", dir=path.parent))
    try:
        with _disk_full_is_an_oserror(path):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it becomes `path` on success and disappears on failure.

    Whatever is at `path` by then is never removed: anything but an empty folder is a FileExistsError.
    """
    path = path.resolve()
    with temporary_folder(path) as temporary:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        settle(temporary, path)


def settle(work: Path, path: Path) -> None:
    """Sync a folder and rename it to `path`; an empty folder there is replaced, anything else stays."""
    sync_folder(work)
    try:
        if path.is_dir():
            work.chmod(path.stat().st_mode & 0o7777)
            path.rmdir()
        work.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"folder {str(path)!r} was created meanwhile, it is left as it is") from error
    _sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Make everything in a folder survive a power cut; files get the mode of any new file."""
    mask = _umask()
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            file.chmod(0o666 & ~mask)
            _sync(file)
        _sync(Path(place))


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock on what is written at `path`, ``.<name>.lock`` next to it; the kernel drops it with its process.

    The lock's empty file stays: removing it would let two processes hold locks of the same name.

    Raises:
        AtomLensError: another process holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise AtomLensError(f"another process is using {str(path)!r}: wait for it, or choose another name=") from None
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in `folder`: all of it, or only what was to become `name`.

    The caller must hold the lock on what is written there.
    """
    for path in folder.glob(f"{_TEMPORARY}{name}.*" if name else f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before the work for it (an AtomLensError)."""
    if path.is_dir():
        raise AtomLensError(f"{option} is {str(path)!r}, a folder: a file name is needed")
    parent = path.absolute().parent
    there = next(p for p in (parent, *parent.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise AtomLensError(f"{option} is {str(path)!r}, below {str(there)!r}, which is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise AtomLensError(f"{option} is {str(path)!r}, but {str(there)!r} is not writable")


def check_new(path: Path, another: str = "another") -> None:
    """Refuse, before any work, an output folder that is not empty (a FileExistsError)."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"output folder {str(path)!r} is not empty: choose {another} or remove it")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def regular_file(path: Path, limit: int | None = None) -> int:
    """The size of a file; anything that is not a file (a pipe would block for ever) or above `limit` is refused.

    Raises:
        FileNotFoundError: there is no such file.
        AtomLensError: it is not a regular file, or longer than `limit` bytes.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} does not exist") from None
    if not stat.S_ISREG(found.st_mode):
        raise AtomLensError(f"{str(path)!r} is not a regular file")
    if limit is not None and found.st_size > limit:
        raise AtomLensError(f"{str(path)!r} has {found.st_size} bytes, allowed are up to {limit}")
    return found.st_size


def read_json(path: Path, limit: int = 1 << 24) -> dict[str, Any]:
    """Read a strict JSON mapping: no NaN, no repeated keys, no excessive depth or length.

    Raises:
        FileNotFoundError: there is no such file.
        AtomLensError: it is anything else.
    """
    regular_file(path, limit)
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise AtomLensError(f"{str(path)!r} is not strict JSON: {shown(str(error))}") from error


def parse_json(text: str) -> dict[str, Any]:
    """A strict JSON mapping: no NaN or infinity, no repeated keys, not too deep; all else is an AtomLensError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite)
    except RecursionError as error:
        raise AtomLensError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise AtomLensError(f"it holds a {type(value).__name__}, a mapping is needed")
    return value


def shown(value: Any) -> str:
    """How messages quote something that was read: on one line, without control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in (value if isinstance(value, str) else repr(value)))
    return text if len(text) <= 200 else text[:197] + "..."


def without_secrets(text: str, *secrets: str | None) -> str:
    """`text` without `secrets`, keys of the environment, what follows "Bearer", and user names in addresses."""
    kept = (os.environ.get(name, "").strip() for name in _SECRET)
    for secret in filter(None, (*secrets, *(key for key in kept if len(key) >= 8))):
        text = text.replace(secret, "[secret]")
    text = re.sub(r"(?i)\b(bearer|basic)\s+[^\s'\",}]{8,}", r"\1 [secret]", text)
    return re.sub(r"(://)[^/\s@]+@", r"\1[secret]@", text)


def visible(text: str, keep: str = "") -> str:
    """`text` with Python's escapes for characters that are invisible or change how their neighbours look.

    These are control characters, including those of terminals and bidi text, and zero-width blanks; except `keep`.
    """
    if text.isprintable():
        return text
    hidden = {c for c in set(text) - {*keep, *_JOINERS} if unicodedata.category(c) in _UNSEEN}
    return "".join(ascii(c)[1:-1] if c in hidden else c for c in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise AtomLensError(f"a key of {shown(', '.join(made))} is repeated")
    return made


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _refused(constant: str) -> NoReturn:
    raise AtomLensError(f"{constant} is not JSON")
