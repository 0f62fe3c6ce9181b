"""Scores from answers: read strictly, summarised per kind, and compared with other judges."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import cohen_kappa_score

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import parse_json, regular_file, shown

SCORES = (1, 2, 3, 4, 5)
_LONGEST = 500  # characters of an explanation that the next question repeats


@dataclass(frozen=True)
class Verdict:
    """A judge's answers about one latent; None for what was not asked or could not be read.

    Attributes:
        kind: of the latent.
        score: of the rubric, 1 to 5.
        detection: balanced accuracy on the rows tested.
        unread: which of "rubric" and "detection" had answers in another form than asked for.
        asked: which of them were answered at all.
    """

    kind: str
    score: int | None
    detection: float | None
    unread: frozenset[str]
    asked: frozenset[str]


def read_rubric(answer: str) -> tuple[str, int] | None:
    """(explanation, score) of an answer, None if it does not have the form asked for: nothing is guessed."""
    found = _object(answer)
    if found is None:
        return None
    said, score = found.get("explanation"), found.get("score")
    if not isinstance(said, str) or not said.strip() or type(score) is not int or score not in SCORES:
        return None
    # JSON in an answer may hold half a surrogate pair, which cannot be sent to a server again.
    return " ".join(said.split())[:_LONGEST].encode(errors="replace").decode(), score


def read_detection(answer: str, count: int) -> set[int] | None:
    """The numbers from 1 to `count` that an answer names; None if it does not have the form asked for."""
    found = _object(answer)
    named = None if found is None else found.get("strong")
    if not isinstance(named, list) or any(type(n) is not int or not 1 <= n <= count for n in named):
        return None
    return set(named)


def _object(answer: str) -> dict[str, Any] | None:
    """The JSON object in an answer, which may be fenced or surrounded by sentences."""
    try:
        return parse_json(answer[max(0, answer.find("{")) : answer.rfind("}") + 1])
    except ValueError:
        return None


def balanced_accuracy(named: set[int], strong: Sequence[bool]) -> float:
    """Mean of the shares of strong and of quiet rows that were classified correctly; 0.5 is chance."""
    right = np.array([(number in named) == is_strong for number, is_strong in enumerate(strong, 1)])
    truth = np.asarray(strong)
    return float((right[truth].mean() + right[~truth].mean()) / 2)


def kind_figures(verdicts: Sequence[Verdict], control: str, seed: int) -> dict[str, dict[str, Any]]:
    """Kind -> means of rubric and detection, with 95% intervals over latents, and their excess over `control`."""
    kinds = dict.fromkeys(verdict.kind for verdict in verdicts)
    values = {
        (kind, task): np.array([v for one in verdicts if one.kind == kind and (v := getattr(one, name)) is not None])
        for kind in kinds
        for task, name in (("rubric", "score"), ("detection", "detection"))
    }
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        found[kind] = {}
        for task in ("rubric", "detection"):
            of = [one for one in verdicts if one.kind == kind and task in one.asked]
            mine, floor = values[kind, task].astype(float), values.get((control, task), np.empty(0)).astype(float)
            found[kind][task] = {
                "asked": len(of),
                "unparsed": sum(task in one.unread for one in of) / len(of) if of else None,
                "n": len(mine),
                "mean": float(mine.mean()) if len(mine) else None,
                "interval": _interval([mine], seed),
                "above_control": float(mine.mean() - floor.mean()) if len(mine) and len(floor) else None,
                "above_control_interval": _interval([mine, floor], seed),
            }
    return found


def _interval(samples: Sequence[np.ndarray], seed: int) -> list[float] | None:
    """95% percentile interval of the mean of one sample, or of the difference of two means; None below 2 latents."""
    if any(len(sample) < 2 for sample in samples):
        return None

    def statistic(*parts: np.ndarray, axis: int) -> np.ndarray:
        means = [part.mean(axis=axis) for part in parts]
        return means[0] - sum(means[1:])

    found = bootstrap(
        samples, statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed), vectorized=True
    ).confidence_interval
    return [float(found.low), float(found.high)]


def agreement(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, Any]:
    """Spearman's correlation and quadratic-weighted kappa of two judges over the questions that both scored.

    None where they are undefined: fewer than two questions, or a judge that always gave the same score.
    """
    both = sorted(set(one) & set(other))
    a, b = [one[name] for name in both], [other[name] for name in both]
    defined = len(set(a)) > 1 and len(set(b)) > 1
    rank: Any = spearmanr(a, b) if defined else None
    return {
        "n": len(both),
        "spearman": float(rank.statistic) if defined else None,
        "kappa": float(cohen_kappa_score(a, b, labels=SCORES, weights="quadratic")) if defined else None,
    }


def human_scores(path: Path, questions: set[str]) -> dict[str, int]:
    """Question -> score of a CSV with the columns question and score; rows without a score were not judged.

    Raises:
        FileNotFoundError: there is no such file.
        AtomLensError: a column is missing, a question is unknown or repeated, or a score is not 1 to 5.
    """
    regular_file(path, limit=1 << 26)
    found: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for column in ("question", "score"):
                if column not in (reader.fieldnames or ()):
                    raise AtomLensError(f"human {str(path)!r} has no column {column!r}, needed are question and score")
            rows = [(str(row["question"] or "").strip(), str(row["score"] or "").strip()) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise AtomLensError(f"human {str(path)!r} is not a CSV in UTF-8: {error}") from error
    for question, score in rows:
        if not score:
            continue
        if question not in questions or question in found:
            why = "is repeated" if question in found else "was not asked: use the blind.csv of the same command"
            raise AtomLensError(f"human {str(path)!r}: question {shown(question)!r} {why}")
        if score not in map(str, SCORES):
            raise AtomLensError(f"human {str(path)!r}: score of {question} is {shown(score)!r}, allowed are 1 to 5")
        found[question] = int(score)
    return found
