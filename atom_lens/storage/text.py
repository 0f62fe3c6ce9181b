"""Text files: in UTF-8 or with a byte-order mark, with any of the usual line endings."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from atom_lens.errors import AtomLensError

# Longest first: the mark of UTF-32 starts with that of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in the encoding of its byte-order mark, without the mark.

    Raises:
        OSError: no such file.
        AtomLensError: it is not such text; the message names the line and the byte.
    """
    raw = Path(path).read_bytes()
    encoding = _encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        name, line = encoding.removesuffix("-sig").upper(), raw.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start}, in line {line}: {error.reason}"
        raise AtomLensError(f"{str(path)!r} is not text in {name} at {where}") from None
    if (at := text.find("\0")) >= 0:
        raise AtomLensError(f"{str(path)!r} is not text: there is a NUL in line {len(lines_of(text[:at]))}")
    return text


def lines_in(path: str | Path) -> Iterator[str]:
    """The lines of `read_text`, one at a time, for files that do not fit in memory; the same errors."""
    with open(path, "rb") as file:
        encoding = _encoding(file.read(4))
    try:
        with open(path, encoding=encoding) as text:
            for line in text:
                if "\0" in line:
                    read_text(path)  # its error says where
                yield line.removesuffix("\n")
    except UnicodeDecodeError:
        read_text(path)
        raise


def _encoding(start: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def lines_of(text: str) -> list[str]:
    """Lines as in files: ended by LF, CR LF or CR, and by none of Unicode's other separators."""
    return re.split(r"\r\n|\n|\r", text)


def existing(path: str | Path) -> Path:
    """The path of a file that exists.

    Raises:
        AtomLensError: it does not.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise AtomLensError(f"file {str(path)!r} does not exist")
    return found
