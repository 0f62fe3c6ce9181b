"""Convert: any dictionary that can be read, written as a folder for sae-lens and everything built on it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from sae_lens.constants import SAE_CFG_FILENAME

from atom_lens.dictionaries.load import atoms_folder, open_dictionary
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.weights import Thresholds
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import check_new, new_folder, read_json
from atom_lens.storage.terminal import say

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
        source: anything that `load_atoms` reads except releases of sae-lens; of any architecture that sae-lens has.
        out: the new folder.
        hook, revision: which dictionary, as in `load_atoms`.
        dtype: of the weights; None keeps theirs.
        threshold: whether bare weights hold thresholds ("plain") or their logarithms ("log"); "auto" decides by name.

    Raises:
        FileExistsError: `out` is not empty.
        AtomLensError: nothing of a known kind at `source`, or a dtype that is not allowed.
    """
    out = Path(out)
    check_new(out)
    if dtype not in (None, *_DTYPES):
        raise AtomLensError(f"dtype is {dtype!r}, allowed are {', '.join(_DTYPES)}")
    if threshold not in get_args(Thresholds):
        raise AtomLensError(f"threshold is {threshold!r}, allowed are {', '.join(get_args(Thresholds))}")
    folder = atoms_folder(source, hook, revision)
    sae = open_dictionary(folder, dtype=dtype, threshold=threshold)
    if isinstance(sae, Metered):
        sae.save_model(out)
    else:
        with new_folder(out) as temporary:
            sae.save_model(temporary)
    return out


def command(
    source: str,
    out: Path,
    /,
    *,
    hook: str | None = None,
    dtype: str | None = None,
    threshold: Thresholds = "auto",
) -> None:
    """Write atoms, or another library's dictionary, as an sae-lens folder.

    Example: atom-lens convert runs/cities-16k atoms-9 --hook 9 --dtype bfloat16

    Args:
        source: folder, file or user/name, of ours or another library
        out: the new folder
        hook: which dictionary, if there are several: a name, a glob or a layer
        dtype: of the weights: float32, bfloat16 or float16 (default: theirs)
        threshold: whether bare weights hold thresholds or their logarithms
    """
    folder = convert(source, out, hook=hook, dtype=dtype, threshold=threshold)
    cfg = read_json(folder / SAE_CFG_FILENAME)
    say(f"{cfg['architecture']}, {cfg['d_sae']} x {cfg['d_in']}, {cfg['dtype']}: written to {folder}")
