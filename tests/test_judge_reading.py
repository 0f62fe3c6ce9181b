"""What a judge is shown, how its answers are read, and agreement of two judges."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata
from support.judging import SMALL, Server, kappa, planted_concepts, rubrics

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.recipe.contexts import Corpus
from atom_lens.studies.judge.run import judge
from atom_lens.studies.judge.sampling import draw_cases, marked, rubric_question
from atom_lens.studies.judge.scoring import agreement, balanced_accuracy, human_scores, read_detection, read_rubric
from atom_lens.tensors.rows import Rows


def test_nothing_that_was_shown_is_tested() -> None:
    made, codes, heldout = planted_concepts()
    cases, _ = draw_cases(codes, heldout, latents=3, contexts=9, seed=1)
    assert len(cases) == 6 and len({(case.kind, case.latent) for case in cases}) == 6
    for case in cases:
        values = codes[case.kind].toarray()[:, case.latent]
        trained_on = sorted(np.flatnonzero((values > 0) & ~heldout), key=lambda row: -values[row])
        assert set(case.shown) == set(trained_on[:9])
        assert len(set(case.tested)) == 8 and all(heldout[case.tested])
        assert [bool(values[row] > 0) for row in case.tested] == case.strong and sum(case.strong) == 4
        assert rubric_question(case, made).count("<<") == 9 + 1
    again, _ = draw_cases(codes, heldout, latents=3, contexts=9, seed=1)
    assert again == cases


def test_a_context_is_one_line_with_its_token_marked() -> None:
    texts = ["x" * 300 + "\nnew " + "york" + " is\r\n big" * 30, "a  b"]
    places = torch.tensor([[0, 304, 309], [1, 1, 3]])
    made = Corpus(Rows(torch.zeros(2, 1)), [Prompt(t) for t in texts], places, torch.tensor([True, False]))
    line = marked(made, 0)
    assert "\n" not in line and "\r" not in line and line.startswith("…x") and line.endswith("…")
    assert "\\nnew <<york>> is\\n big" in line
    assert marked(made, 1) == "a<<  >>b", "a token of blanks keeps them"


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ('{"explanation": "cities  in\\n Peru", "score": 4}', ("cities in Peru", 4)),
        ('Sure!\n```json\n{"score": 1, "explanation": "x"}\n```', ("x", 1)),
        ('{"explanation": "\\ud800x", "score": 4}', ("?x", 4)),
        ('{"explanation": "x", "score": 6}', None),
        ('{"explanation": "x", "score": 4.0}', None),
        ('{"explanation": "x", "score": "4"}', None),
        ('{"explanation": "x", "score": true}', None),
        ('{"explanation": " ", "score": 4}', None),
        ('{"explanation": ["x"], "score": 4}', None),
        ('{"explanation": "x", "score": 4} or {"explanation": "y", "score": 2}', None),
        ('{"explanation": "x", "score": 4, "score": 5}', None),
        ("the score is 4", None),
        ("", None),
    ],
)
def test_rubrics_are_read_strictly(answer: str, read: tuple[str, int] | None) -> None:
    assert read_rubric(answer) == read


def test_detections_are_read_strictly() -> None:
    assert read_detection('{"strong": [1, 3, 3]}', 4) == {1, 3}
    assert read_detection('{"strong": []}', 4) == set()
    for answer in (
        '{"strong": [0]}',
        '{"strong": [5]}',
        '{"strong": ["1"]}',
        '{"strong": 1}',
        '{"strong": [true]}',
        "1",
    ):
        assert read_detection(answer, 4) is None
    assert balanced_accuracy({1, 2}, [True, True, False, False]) == 1
    assert balanced_accuracy({1, 2, 3, 4}, [True, True, False, False]) == 0.5
    assert balanced_accuracy({3}, [True, False, False, False]) == pytest.approx(1 / 3)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_answer_is_an_error(answer: str) -> None:
    for text in (answer, f'{{"explanation": "x", "score": {answer}}}', f'{{"strong": {answer}}}'):
        said, named = read_rubric(text), read_detection(text, 3)
        assert said is None or said[1] in range(1, 6)
        assert named is None or named <= {1, 2, 3}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=40))
def test_agreement_against_its_formulas(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(part) for part in zip(*pairs, strict=True))
    one, other = ({f"q{i}": int(score) for i, score in enumerate(part)} for part in (a, b))
    found = agreement({**one, "mine": 3}, {**other, "theirs": 2})
    assert found["n"] == len(pairs)
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert found["spearman"] is None and found["kappa"] is None
        return
    assert found["spearman"] == pytest.approx(pearsonr(rankdata(a), rankdata(b)).statistic)
    assert found["kappa"] == pytest.approx(kappa(a, b))


def test_a_person_fills_in_the_blind_questions(judging: Path, server: Server, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    judge(judging, **arguments)
    blind = tmp_path / "out" / "blind.csv"
    with blind.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["text"] for row in rows} == set(rubrics(server.requests))
    assert {row["score"] for row in rows} == {""}
    for number, row in enumerate(rows[:-3]):
        row["score"] = str(1 + number % 5)
    with blind.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "text", "score"])
        writer.writeheader()
        writer.writerows(rows)
    filled = blind.read_text()
    asked = len(server.requests)
    found = judge(judging, human=blind, **arguments)["judge"]
    judged = np.array([one["score"] for one in found["latents"]])[:-3]
    by_hand = np.array([int(row["score"]) for row in rows[:-3]])
    human = found["agreement"]["human"]
    assert human["n"] == len(rows) - 3 == len(judged) and len(server.requests) == asked
    assert human["kappa"] == pytest.approx(kappa(judged, by_hand))
    assert human["spearman"] == pytest.approx(pearsonr(rankdata(judged), rankdata(by_hand)).statistic)
    assert blind.read_text() == filled, "hours of work are not overwritten"
    with pytest.raises(ValueError, match=r"blind.csv' holds other questions: move it away"):
        judge(judging, **{**arguments, "seed": 3})
    assert blind.read_text() == filled and len(server.requests) == asked


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question,points\nq1,3\n", "no column 'score'"),
        ("", "no column 'question'"),
        ("question,score\nq1,6\n", "score of q1 is '6', allowed are 1 to 5"),
        ("question,score\nq9,3\n", "question 'q9' was not asked"),
        ("question,score\nq1,3\nq1,4\n", "question 'q1' is repeated"),
        ("question,score\nq1,3\n\xff", "not a CSV in UTF-8"),
    ],
)
def test_scores_of_a_person_that_do_not_fit(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "human.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says):
        human_scores(tmp_path / "human.csv", {"q1", "q2"})
    (tmp_path / "human.csv").write_text("score,question,note\n 3,q1 ,x\n,q2,\n")
    assert human_scores(tmp_path / "human.csv", {"q1", "q2"}) == {"q1": 3}
