"""The page of an audit: its tables, and the latents browser of each dictionary."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.evidence.identity import Identity
from atom_lens.evidence.measure import Observation
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.studies.audit.reading import Read
from atom_lens.studies.audit.result import Audit
from atom_lens.studies.audit.show import show
from atom_lens.studies.report.atoms import browse
from atom_lens.studies.report.browsers import lens_for, words_of
from atom_lens.studies.report.run import joined
from atom_lens.views.page import About, Section, save


def write_page(
    path: Path,
    result: Audit,
    opened: Mapping[str, Any],
    seen: Mapping[str, Observation],
    read: Read,
    aip: AtomicInnerProduct,
    pairs: Mapping[tuple[str, str], Identity],
) -> None:
    """Write one HTML file about an audit; it needs no network.

    Args:
        path: the file.
        result: the audit.
        opened: its dictionaries by name.
        seen: each of them observed on the held-out activations.
        read: what they were read on; without texts there is nothing to browse.
        aip: neighbours are found under it.
        pairs: the agreement of each pair of dictionaries.
    """
    sections = joined(show(result, path.stem))
    if read.corpus is None:
        why = "Latents are left out: the audit was of given activations, so there are no texts to show."
        sections.append(Section("Atoms", why))
    else:
        hook = str(result.hook)
        lens = lens_for([hook], lambda: read.model)
        browsers = {
            label: {
                **browse(one, aip, read.corpus, seen[label], _scores(label, seen[label], pairs), "metric"),
                "words": words_of(lens, hook, one),
            }
            for label, one in opened.items()
        }
        intro = (
            "Every latent, with the contexts it fires on most strongly, held-out and in the text that the metric was "
            "estimated on."
        )
        sections.append(Section("Atoms", intro, browsers=browsers))
    names = ", ".join(opened)
    save(
        path,
        f"Audit of {names}",
        sections,
        [About(names, "", result.versions)],
        shlex.join(["atom-lens", "audit", *opened]),
    )


def _scores(label: str, seen: Observation, pairs: Mapping[tuple[str, str], Identity]) -> Float[Tensor, " F"] | None:
    """The mean coherence of every atom with its partners in the other dictionaries, NaN for a silent atom."""
    found = [one.scores[names.index(label)] for names, one in pairs.items() if label in names]
    if not found:
        return None
    return torch.stack(found).mean(dim=0).masked_fill(~seen.alive.cpu(), torch.nan)
