"""Printing: without characters that a terminal would obey, and nothing if the user asked for quiet."""

from __future__ import annotations

import os
import sys
from typing import Any

from atom_lens.storage.files import visible

QUIET = "ATOM_LENS_QUIET"


def is_quiet() -> bool:
    """Whether the user asked for quiet, or another of several processes prints."""
    return bool(os.environ.get(QUIET))


def say(text: str, file: Any = None) -> None:
    """Print text that may come from recipes, models, prompts and the Hub; on stdout only unless quiet."""
    if file is None and is_quiet():
        return
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"  # a terminal may have no R², or no Chinese
    print(visible(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding), file=file)
