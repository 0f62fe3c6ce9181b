"""Ask judges and a person the questions of a study, as far as the budget reaches, and score the answers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atom_lens.errors import AtomLensError
from atom_lens.recipe.contexts import Corpus
from atom_lens.storage.files import replacing
from atom_lens.studies.judge.client import Budget, BudgetSpentError, Judge, estimated_tokens
from atom_lens.studies.judge.kinds import CONTROL
from atom_lens.studies.judge.sampling import VERSION, Case, detection_question, question_name, rubric_question
from atom_lens.studies.judge.scoring import (
    Verdict,
    agreement,
    balanced_accuracy,
    human_scores,
    kind_figures,
    read_detection,
    read_rubric,
)

_RUBRIC_TOKENS, _DETECTION_TOKENS = 200, 100
_EXPLANATION = 160  # characters assumed before there are explanations


def estimate(cases: list[Case], corpus: Corpus, spending: Budget, models: int) -> dict[str, Any]:
    """Questions, tokens and dollars; answers are assumed to be as long as allowed, except for explanations."""
    rubric = sum(estimated_tokens(rubric_question(case, corpus)) for case in cases)
    detection = sum(estimated_tokens(detection_question(case, corpus, "x" * _EXPLANATION)) for case in cases)
    read = rubric * models + detection
    written = len(cases) * (_RUBRIC_TOKENS * models + _DETECTION_TOKENS)
    return {
        "questions": len(cases) * (models + 1),
        "read": read,
        "written_at_most": written,
        "dollars_at_most": spending.cost(read, written),
    }


def ask_all(
    cases: list[Case], corpus: Corpus, judges: list[Judge], human: Path | None, out: Path, seed: int
) -> dict[str, Any]:
    """Ask the first judge everything, the others for the rubric only; returns what judge.json says (`judge`).

    Args:
        cases: in the order in which they are asked.
        corpus: their rows.
        judges: one or more, with a shared budget.
        human: CSV of a person's scores.
        out: folder for blind.csv.
        seed: of the bootstrap.

    Raises:
        AtomLensError: a person's file does not fit, another blind.csv is there, or a server does not answer.
    """
    questions = [rubric_question(case, corpus) for case in cases]
    names = [question_name(question) for question in questions]
    _write_blind(out / "blind.csv", questions)
    by_hand = None if human is None else human_scores(human, set(names))

    first = judges[0]
    rubrics = _asked(first, questions, _RUBRIC_TOKENS)
    said = [None if answer is None else read_rubric(answer) for answer in rubrics]
    # None where there is no explanation to test: then there is no such question
    tests = [
        None if one is None else detection_question(case, corpus, one[0]) for case, one in zip(cases, said, strict=True)
    ]
    detections = _asked(first, tests, _DETECTION_TOKENS)
    verdicts = [
        _verdict(case, rubric, one, detection)
        for case, rubric, one, detection in zip(cases, rubrics, said, detections, strict=True)
    ]
    scores = {name: one[1] for name, one in zip(names, said, strict=True) if one is not None}
    wanted = len(questions) + sum(test is not None for test in tests)
    answered = sum(answer is not None for answer in (*rubrics, *detections))
    agree: dict[str, Any] = {}
    for other in judges[1:]:
        answers = _asked(other, questions, _RUBRIC_TOKENS)
        read = [(name, read_rubric(a)) for name, a in zip(names, answers, strict=True) if a is not None]
        agree["second_model"] = agreement(scores, {name: one[1] for name, one in read if one is not None})
        agree["second_model"]["unparsed"] = sum(one is None for _, one in read) / len(read) if read else None
        wanted, answered = wanted + len(questions), answered + len(read)
    if by_hand is not None:
        agree["human"] = agreement(scores, by_hand)
    spending = first.budget
    return {
        "complete": answered == wanted,
        "questions": wanted,
        "answered": answered,
        "asked_now": sum(one.asked for one in judges),
        "read": spending.read,
        "written": spending.written,
        "dollars": spending.spent,
        "budget": spending.dollars,
        "prices": list(spending.prices),
        "kinds": kind_figures(verdicts, CONTROL, seed),
        "agreement": agree,
        "latents": [
            {
                "kind": case.kind,
                "latent": case.latent,
                "explanation": None if one is None else one[0],
                "score": verdict.score,
                "detection": verdict.detection,
            }
            for case, one, verdict in zip(cases, said, verdicts, strict=True)
        ],
    }


def _asked(judge: Judge, questions: Sequence[str | None], max_tokens: int) -> list[str | None]:
    """The answers; None where there is no question, and once the budget is spent."""
    answers: list[str | None] = [None] * len(questions)
    for at, question in enumerate(tqdm(questions, desc=f"asking {judge.model}", unit="question")):
        if question is None:
            continue
        try:
            answers[at] = judge.ask(VERSION, question, max_tokens)
        except BudgetSpentError:
            break
    return answers


def _verdict(case: Case, rubric: str | None, said: tuple[str, int] | None, detection: str | None) -> Verdict:
    named = None if detection is None else read_detection(detection, len(case.tested))
    tasks = {"rubric": (rubric, said), "detection": (detection, named)}
    return Verdict(
        case.kind,
        None if said is None else said[1],
        None if named is None else balanced_accuracy(named, case.strong),
        frozenset(task for task, (answer, read) in tasks.items() if answer is not None and read is None),
        frozenset(task for task, (answer, _) in tasks.items() if answer is not None),
    )


def _write_blind(path: Path, questions: list[str]) -> None:
    """Write the questions for a person to score in the last column; an existing file may hold hours of such work."""
    rows = {question_name(question): question for question in questions}
    if path.exists():
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                there = {row.get("question") for row in csv.DictReader(file)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise AtomLensError(f"{str(path)!r} is not a CSV in UTF-8: move it away, or save it as one") from error
        if there != set(rows):
            raise AtomLensError(f"{str(path)!r} holds other questions: move it away, or choose another out=")
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "text", "score"])
        writer.writerows([name, question, ""] for name, question in rows.items())
