"""Convert: any dictionary that can be read, written as a folder that sae-lens and whatever builds on it reads."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from atom_lens.dictionaries.load import atoms_folder, open_dictionary
from atom_lens.dictionaries.tsae.sae import TSAE
from atom_lens.dictionaries.weights import Thresholds
from atom_lens.storage.files import new_folder

_DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    hook: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    threshold: Thresholds = "auto",
) -> Path:
    """Write the dictionary at `source` as an sae-lens folder; returns `out`, which appears whole or not at all.

    Atoms keep their metric, exactly, whatever `dtype` their weights are written in.

    Args:
        source: anything `load_atoms` reads from, of any architecture that sae-lens has, but for its releases.
        out: the new folder.
        hook, revision: which dictionary, as in `load_atoms`.
        dtype: of the weights; None keeps theirs.
        threshold: whether bare weights hold thresholds ("plain") or their logarithms ("log"); "auto" goes by the name.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: nothing known at `source`, or a dtype that is not allowed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"output folder {str(out)!r} is not empty: choose another or remove it")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype is {dtype!r}, allowed are {', '.join(_DTYPES)}")
    if threshold not in get_args(Thresholds):
        raise ValueError(f"threshold is {threshold!r}, allowed are {', '.join(get_args(Thresholds))}")
    folder = atoms_folder(source, hook, revision)
    sae = open_dictionary(folder, dtype=dtype, threshold=threshold)
    if isinstance(sae, TSAE):
        sae.save_model(out)
    else:
        with new_folder(out) as temporary:
            sae.save_model(temporary)
    return out
