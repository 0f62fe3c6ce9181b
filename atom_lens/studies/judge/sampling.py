"""The questions to a judge: latents drawn of each kind, and their contexts, without telling whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from scipy.sparse import csc_array

from atom_lens.evidence.codes import active_rows
from atom_lens.recipe.contexts import Corpus
from atom_lens.storage.files import visible

VERSION = "v1"
_BEFORE, _AFTER = 200, 60  # characters shown around the token read
_LONGEST = 120  # characters shown of it


@dataclass(frozen=True)
class Case:
    """A latent, and the rows it is judged by: training rows are shown, held-out rows are tested.

    Attributes:
        kind: of the latent; never told to the judge.
        latent: its index; never told either.
        shown: its strongest training rows, in random order.
        tested: held-out rows in random order, half of which it is active at.
        strong: whether it is active at each row tested.
    """

    kind: str
    latent: int
    shown: list[int]
    tested: list[int]
    strong: list[bool]


def draw_cases(
    codes: Mapping[str, csc_array], heldout: np.ndarray, latents: int, contexts: int, seed: int
) -> tuple[list[Case], dict[str, int]]:
    """Up to `latents` latents of each kind, all kinds shuffled together, and how many of each kind could be drawn.

    A latent can be drawn if it is active at `contexts` training rows and at half as many held-out ones.

    Args:
        codes: kind -> shape (n, F).
        heldout: shape (n,).
        latents: number of latents of each kind.
        contexts: number of rows shown, and of rows tested (rounded down to an even number).
        seed: of the draws and the order.
    """
    draw = np.random.default_rng(seed)
    half = contexts // 2
    cases, living = [], {}
    for kind, of in codes.items():
        rows_of = [active_rows(of, latent)[0] for latent in range(len(of.indptr) - 1)]
        able = [
            u for u, rows in enumerate(rows_of) if (~heldout[rows]).sum() >= contexts and heldout[rows].sum() >= half
        ]
        living[kind] = len(able)
        for latent in draw.permutation(able)[:latents].tolist():
            rows = rows_of[latent]
            quiet = np.setdiff1d(np.flatnonzero(heldout), rows)
            if len(quiet) < half:
                continue
            shown = draw.permutation(rows[~heldout[rows]][:contexts])
            active = draw.choice(rows[heldout[rows]], half, replace=False)
            tested = np.concatenate([active, draw.choice(quiet, half, replace=False)])
            order = draw.permutation(len(tested))
            strong = (order < half).tolist()
            cases.append(Case(kind, latent, shown.tolist(), tested[order].tolist(), strong))
    return [cases[i] for i in draw.permutation(len(cases))], living


def rubric_question(case: Case, corpus: Corpus) -> str:
    """The question to a judge about the rows shown."""
    return prompt_file("rubric").format(count=len(case.shown), excerpts=_excerpts(corpus, case.shown))


def detection_question(case: Case, corpus: Corpus, explanation: str) -> str:
    """The question to a judge about the rows tested, given its explanation of those shown."""
    said = " ".join(explanation.split())
    return prompt_file("detect").format(
        explanation=said, count=len(case.tested), excerpts=_excerpts(corpus, case.tested)
    )


def question_name(question: str) -> str:
    """A name for a question that reveals nothing about it."""
    return hashlib.sha256(question.encode()).hexdigest()[:12]


def prompt_file(name: str) -> str:
    """The text of a versioned prompt."""
    file = files("atom_lens.studies.judge") / "prompts" / VERSION / f"{name}.txt"
    return file.read_text(encoding="utf-8")


def marked(corpus: Corpus, row: int) -> str:
    """The text around a row on one line, with the token read between << and >>."""
    text, (start, end) = corpus.prompt(row).text, corpus.span(row)
    lead = len(text[start:end]) - len(text[start:end].lstrip())  # a token often starts with a blank
    start += lead if start + lead < end else 0
    before = ("…" if start > _BEFORE else "") + text[max(0, start - _BEFORE) : start]
    token = text[start:end] if end - start <= _LONGEST else text[start : start + _LONGEST - 1] + "…"
    after = text[end : end + _AFTER] + ("…" if end + _AFTER < len(text) else "")
    before, token, after = map(_inside, (before, token, after))
    return f"{before}<<{token}>>{after}"


def _inside(text: str) -> str:
    """`text` without anything that a judge could take for the end of its line or for the mark: code contains <<."""
    return visible(text.replace("\r\n", "\n"), keep="\t").replace("<<", "‹‹").replace(">>", "››")


def _excerpts(corpus: Corpus, rows: Sequence[int]) -> str:
    return "\n".join(f"{number}. {marked(corpus, row)}" for number, row in enumerate(rows, 1))
