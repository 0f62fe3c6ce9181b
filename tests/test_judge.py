"""Judging: a real server on loopback that may fail, planted concepts with a known verdict, and transformers serve."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.sparse import csc_array
from scipy.stats import pearsonr, rankdata
from test_cli import recipe, run  # noqa: F401  (fixtures)

from atom_lens import load_atoms, publish, train
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.cli import main
from atom_lens.dictionaries.baselines.bases import Basis, neurons
from atom_lens.evidence.codes import active_rows
from atom_lens.evidence.purity import purity
from atom_lens.recipe.contexts import Corpus, corpus
from atom_lens.recipe.reading import check_recipe, load_recipe
from atom_lens.storage.sealed import verify
from atom_lens.studies.evaluate import check_split
from atom_lens.studies.judge.asking import ask_all
from atom_lens.studies.judge.client import Budget, Judge, estimated_tokens
from atom_lens.studies.judge.kinds import CONTROL, NOT_ASKED, label_purity, read_kinds, strongest
from atom_lens.studies.judge.run import _default_out, judge
from atom_lens.studies.judge.sampling import VERSION, draw_cases, marked, rubric_question
from atom_lens.studies.judge.scoring import agreement, balanced_accuracy, human_scores, read_detection, read_rubric
from atom_lens.studies.judge.tables import judge_table
from atom_lens.tensors.rows import Rows

KEY = "sk-a-key-that-must-not-be-kept"
COUNTRIES = ["Chad", "Fiji", "Mali", "Peru"]
SMALL: dict[str, Any] = {"units": 4, "contexts": 2}


class Server:
    """chat_server.py in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.plan([])
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("chat_server.py"), folder])
        while not (folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}/v1"

    def plan(self, modes: list[str]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(modes))

    @property
    def requests(self) -> list[dict[str, Any]]:
        file = self.folder / "requests.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server(tmp_path / "server")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A run on the tiny model whose prompts have answers."""
    folder = tmp_path_factory.mktemp("judged")
    draw = random.Random(0)
    subjects = sorted({"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(200)})
    lines = [
        json.dumps({"template": "{} is a city in", "subject": s, "answer": draw.choice(COUNTRIES)}) for s in subjects
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    made = {
        "name": "tiny",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(folder / "prompts.jsonl")},
        "hooks": ["blocks.1.hook_resid_post"],
        "atoms": {"capacity": 24, "target_l0": 4.0},
        "training": {"steps": 30, "batch_size": 32, "device": "cpu"},
    }
    with pytest.MonkeyPatch.context() as patch:  # the tests' own cache, as in conftest.py
        patch.setenv("ATOM_LENS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train(check_recipe(made), out=folder)


def rubrics(requests: list[dict[str, Any]]) -> list[str]:
    questions = [request["body"]["messages"][0]["content"] for request in requests]
    return [question for question in questions if '"score"' in question]


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Quadratic-weighted, by its formula."""
    apart = np.subtract.outer(a, b) ** 2
    return float(1 - np.diag(apart).mean() / apart.mean())


def ask(server: Server, cache: Path, question: str, budget: Budget | None = None) -> str:
    return Judge("m", server.url, cache, budget or Budget(1.0, (0.0, 0.0))).ask(VERSION, question, 50)


def test_a_whole_study_and_again_from_the_cache(trained: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = judge(trained, model="m", base_url=server.url, out=out, second_model="other", **SMALL)
    judged = found["judge"]
    assert json.loads((out / "judge.json").read_text()) == found
    assert judged["complete"] and judged["answered"] == judged["questions"] == judged["asked_now"]
    assert len(server.requests) == judged["asked_now"] == len(list((out / "cache").iterdir()))
    assert judged["read"] == 100 * len(server.requests) and judged["written"] == 10 * len(server.requests)
    assert set(judged["kinds"]) == {"atoms", "neurons", "random directions", CONTROL}
    for one in judged["kinds"].values():
        assert one["rubric"]["asked"] == one["rubric"]["n"] == one["detection"]["n"] == 4
        assert 1 <= one["rubric"]["mean"] <= 5 and one["rubric"]["unparsed"] == 0
    # The other model gives the opposite scores.
    scores = np.array([one["score"] for one in judged["units"]])
    opposite = judged["agreement"]["second_model"]
    assert opposite["n"] == 16 == len(scores) and opposite["unparsed"] == 0
    assert opposite["spearman"] == pytest.approx(-1) and opposite["kappa"] == pytest.approx(kappa(scores, 6 - scores))
    assert {request["body"]["model"] for request in server.requests} == {"m", "other"}
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
        assert request["body"]["temperature"] == 0 and request["body"]["max_tokens"] in (100, 200)
    asked = len(server.requests)
    again = judge(trained, model="m", base_url=server.url, out=out, second_model="other", **SMALL)
    assert len(server.requests) == asked and again["judge"]["asked_now"] == 0
    assert {**again["judge"], "asked_now": asked} == judged
    assert "0 asked now" in judge_table(again)


def test_the_judge_is_told_nothing(trained: Path, server: Server, tmp_path: Path) -> None:
    """No kind, no index, nothing of the model; kinds are asked about in mixed order, another one with another seed."""
    read = corpus(load_recipe(trained / "recipe.yaml"), "blocks.1.hook_resid_post")
    texts = {marked(read, row) for row in range(len(read))}
    found = [
        judge(trained, model="m", base_url=server.url, out=tmp_path / str(seed), seed=seed, **SMALL)["judge"]["units"]
        for seed in (0, 1)
    ]
    for request in server.requests:
        assert set(request["body"]) == {"model", "messages", "temperature", "max_tokens"}
        (message,) = request["body"]["messages"]
        lines = message["content"].splitlines()
        excerpts = [one.groups() for line in lines if (one := re.fullmatch(r"(\d+)\. (.*)", line))]
        assert [number for number, _ in excerpts] == ["1", "2"] and {text for _, text in excerpts} <= texts
        frame = "\n".join(line for line in lines if not re.match(r"\d+\. ", line))
        for word in ("atom", "neuron", "feature", "random direction", "data point", "blocks.", "hook", "tiny", "unit"):
            assert word not in frame.lower()
    orders = [[one["kind"] for one in units] for units in found]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0]) and sorted(orders[0]) == sorted(orders[1])
    blind = (tmp_path / "0" / "blind.csv").read_text().lower()
    assert not any(word in blind for word in ("atom", "neuron", "random direction"))


def test_a_dry_run_asks_and_writes_nothing(trained: Path, server: Server, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    found = judge(trained, dry_run=True, prices=(1.0, 2.0), **arguments)
    assert server.requests == [] and not (tmp_path / "out").exists()
    estimate = found["judge"]["estimate"]
    assert "nothing was asked (dry run)" in judge_table(found)
    asked = judge(trained, **arguments)["judge"]
    assert estimate["questions"] == asked["questions"] == len(server.requests)
    tokens = sum(len(request["body"]["messages"][0]["content"].encode()) for request in server.requests) / 3
    assert estimate["read"] == pytest.approx(tokens, rel=0.2) and estimated_tokens("北京") == 2
    assert estimate["written_at_most"] == sum(request["body"]["max_tokens"] for request in server.requests)
    assert estimate["dollars_at_most"] == pytest.approx((estimate["read"] + 2 * estimate["written_at_most"]) / 1e6)


def test_the_budget_holds_and_more_goes_on(trained: Path, server: Server, tmp_path: Path) -> None:
    """100 tokens read at a dollar each thousand: a few questions fit into a dollar, and the study says it is cut."""
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    arguments["prices"] = (1000.0, 0.0)
    found = judge(trained, budget=1.0, **arguments)["judge"]
    assert not found["complete"] and 0 < found["answered"] == len(server.requests) < found["questions"]
    assert found["dollars"] == pytest.approx(0.1 * found["answered"]) and found["dollars"] <= 1
    asked = found["answered"]
    # What was paid before counts: the same budget asks nothing more.
    same = judge(trained, budget=1.0, **arguments)
    assert len(server.requests) == asked and "INCOMPLETE" in judge_table(same)
    # So does what was paid for other questions; what is not the price of anything does not.
    (tmp_path / "out" / "blind.csv").unlink()
    (tmp_path / "out" / "cache" / "refund.json").write_text('{"answer": "", "read": -1000000, "written": 0}')
    others = judge(trained, budget=1.0, seed=1, **arguments)["judge"]
    assert others["asked_now"] == 0 and others["dollars"] == pytest.approx(found["dollars"])
    assert f"${found['dollars']:.4f} of $1.00" in judge_table(same)
    (tmp_path / "out" / "blind.csv").unlink()
    more = judge(trained, budget=100.0, **arguments)["judge"]
    assert more["complete"] and len(server.requests) == more["questions"]


def test_what_fails_is_asked_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = '1. <<a>>\n2. <<a>>\n{"score"'
    server.plan(["429", "429"])
    said = ask(server, tmp_path / "a", question)
    assert read_rubric(said) == ("words in a", 5) and len(server.requests) == 3
    server.plan(["500"])
    assert ask(server, tmp_path / "b", question) == said and len(server.requests) == 5
    monkeypatch.setattr("atom_lens.studies.judge.client._TIMEOUT", 0.4)
    server.plan(["hang"])
    assert ask(server, tmp_path / "c", question) == said and len(server.requests) == 7
    # A file of the cache that is cut is asked for again.
    (file,) = (tmp_path / "c").iterdir()
    file.write_text(file.read_text()[:20])
    assert ask(server, tmp_path / "c", question) == said and len(server.requests) == 8


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("500", "did not answer: .*500"),
        ("429", "did not answer: .*429"),
        ("401", r"did not answer: .*401.*\[key\]"),
        ("html", "does not speak chat completions"),
        ("empty", "does not speak chat completions"),
    ],
)
def test_a_server_that_never_answers_is_one_sentence(
    mode: str, says: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atom_lens.studies.judge.client._RETRIES", 2)
    server.plan([mode] * 10)
    with pytest.raises(ValueError, match=says) as error:
        ask(server, tmp_path / "cache", "q")
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) == (3 if mode in ("500", "429") else 1)
    assert not (tmp_path / "cache").exists()


def test_what_was_answered_before_a_failure_is_kept(
    trained: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan(["ok"] * 5 + ["401"])
    command = ["judge", str(trained), "--model", "m", "--base-url", server.url, "--units", "4", "--contexts", "2"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "did not answer" in capsys.readouterr().err and not (tmp_path / "out" / "judge.json").exists()
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 5
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "judge.json").read_text())["judge"]
    assert found["asked_now"] == found["questions"] - 5 and len(server.requests) == found["questions"] + 1
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.parent != server.folder:
            assert KEY not in file.read_text(errors="ignore"), file


def test_what_cannot_be_read_is_counted_not_guessed(trained: Path, server: Server, tmp_path: Path) -> None:
    """Every rubric is answered in prose, so no detection can be asked."""
    server.plan(["prose"] * 1000)
    found = judge(trained, model="m", base_url=server.url, out=tmp_path / "out", **SMALL)["judge"]
    assert found["complete"] and len(server.requests) == found["questions"] == 16
    for one in found["kinds"].values():
        assert one["rubric"] == {
            **{"asked": 4, "unparsed": 1.0, "n": 0, "mean": None, "interval": None},
            **{"above_control": None, "above_control_interval": None},
        }
        assert one["detection"]["asked"] == 0 and one["detection"]["unparsed"] is None
    assert "none" in judge_table({**judge(trained, out=tmp_path / "o"), "judge": found})


def test_keys_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    budget = Budget(1.0, (0.0, 0.0))
    for url in ("http://localhost:1/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        Judge("m", url, tmp_path, budget)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set, judge.example needs one"):
        Judge("m", "https://judge.example/v1", tmp_path, budget)
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY is not set, api.openai.com"):
        Judge("m", None, tmp_path, budget)
    for url in ("file:///etc", "http://localhost:abc/v1", "http://localhost:65536", "http://[::1", "http://"):
        with pytest.raises(ValueError, match=f"base_url is {re.escape(repr(url))}, allowed is http"):
            Judge("m", url, tmp_path, budget)
    for url in ("ftp://user:hunter2@host/v1", "user:hunter2@host", "http://user:hunter2@host:abc"):
        with pytest.raises(ValueError, match="base_url is 'host") as error:
            Judge("m", url, tmp_path, budget)
        assert "hunter2" not in str(error.value)
    monkeypatch.setenv("ALL_PROXY", "gopher://me:hunter2@localhost:1")
    with pytest.raises(ValueError, match="127.0.0.2 cannot be reached by this base_url or the proxy") as error:
        Judge("m", "http://127.0.0.2:1/v1", tmp_path, budget)
    assert "hunter2" not in str(error.value)


def test_answers_of_another_server_are_not_taken(server: Server, tmp_path: Path) -> None:
    question = '1. <<a>>\n{"score"'
    said = ask(server, tmp_path / "cache", question)
    url = server.url
    server.url = url.replace("127.0.0.1", "LOCALHOST") + "/"
    assert ask(server, tmp_path / "cache", question) == said and len(server.requests) == 2
    server.url = url.replace("127.0.0.1", "localhost")
    assert ask(server, tmp_path / "cache", question) == said and len(server.requests) == 2


def planted() -> tuple[Corpus, dict[str, csc_array], np.ndarray]:
    """240 one-word prompts; a planted unit is active at the words of its letter, the control's anywhere."""
    draw = np.random.default_rng(0)
    words = [f"{'abcdef'[i % 6]}{i}" for i in range(240)]
    prompts = [Prompt.fill("we saw {} there", word) for word in words]
    heldout = draw.random(240) < 0.4
    places = torch.tensor([[i, *(p.span or ())] for i, p in enumerate(prompts)])
    made = Corpus(Rows(torch.zeros(240, 1)), prompts, places, torch.from_numpy(heldout))
    letters = np.stack([np.arange(240) % 6 == unit for unit in range(6)], axis=1)
    strength = draw.random((240, 6)) + 1
    codes = {"planted": letters * strength, CONTROL: draw.permuted(letters * strength, axis=0)}
    return made, {kind: csc_array(dense) for kind, dense in codes.items()}, heldout


def test_planted_concepts_get_the_verdict_they_deserve(server: Server, tmp_path: Path) -> None:
    """An oracle of letters on the whole way: score 5 and accuracy 1 for letters, 1 and chance for anything else."""
    made, codes, heldout = planted()
    cases, living = draw_cases(codes, heldout, units=6, contexts=8, seed=0)
    assert living == {"planted": 6, CONTROL: 6}
    one = Judge("m", server.url, tmp_path / "cache", Budget(1.0, (0.0, 0.0)))
    found = ask_all(cases, made, [one], None, tmp_path, 0)["kinds"]
    assert found["planted"]["rubric"]["mean"] == 5 and found["planted"]["detection"]["mean"] == 1
    assert found[CONTROL]["rubric"]["mean"] == 1 and found[CONTROL]["detection"]["mean"] == pytest.approx(0.5, abs=0.2)
    assert found["planted"]["rubric"]["above_control_interval"] == [4, 4]
    low, high = found["planted"]["detection"]["above_control_interval"]
    above = found["planted"]["detection"]["above_control"]
    assert 0 < low <= above <= high and above == pytest.approx(1 - found[CONTROL]["detection"]["mean"])


def test_nothing_that_was_shown_is_tested() -> None:
    made, codes, heldout = planted()
    cases, _ = draw_cases(codes, heldout, units=3, contexts=9, seed=1)
    assert len(cases) == 6 and len({(case.kind, case.unit) for case in cases}) == 6
    for case in cases:
        values = codes[case.kind].toarray()[:, case.unit]
        trained_on = sorted(np.flatnonzero((values > 0) & ~heldout), key=lambda row: -values[row])
        assert set(case.shown) == set(trained_on[:9])
        assert len(set(case.tested)) == 8 and all(heldout[case.tested])
        assert [bool(values[row] > 0) for row in case.tested] == case.strong and sum(case.strong) == 4
        assert rubric_question(case, made).count("<<") == 9 + 1
    again, _ = draw_cases(codes, heldout, units=3, contexts=9, seed=1)
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


def test_a_person_fills_in_the_blind_questions(trained: Path, server: Server, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    judge(trained, **arguments)
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
    found = judge(trained, human=blind, **arguments)["judge"]
    judged = np.array([one["score"] for one in found["units"]])[:-3]
    by_hand = np.array([int(row["score"]) for row in rows[:-3]])
    human = found["agreement"]["human"]
    assert human["n"] == len(rows) - 3 == len(judged) and len(server.requests) == asked
    assert human["kappa"] == pytest.approx(kappa(judged, by_hand))
    assert human["spearman"] == pytest.approx(pearsonr(rankdata(judged), rankdata(by_hand)).statistic)
    assert blind.read_text() == filled, "hours of work are not overwritten"
    with pytest.raises(ValueError, match=r"blind.csv' holds other questions: move it away"):
        judge(trained, **{**arguments, "seed": 3})
    assert blind.read_text() == filled and len(server.requests) == asked


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question,points\nq1,3\n", "no column 'score'"),
        ("", "no column 'question'"),
        ("question,score\nq1,6\n", "score of q1 is '6', allowed are 1 to 5"),
        ("question,score\nq9,3\n", "question 'q9' was not asked"),
        ("question,score\nq1,3\nq1,4\n", "question 'q1' stands twice"),
        ("question,score\nq1,3\n\xff", "not a CSV in UTF-8"),
    ],
)
def test_scores_of_a_person_that_do_not_fit(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "human.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says):
        human_scores(tmp_path / "human.csv", {"q1", "q2"})
    (tmp_path / "human.csv").write_text("score,question,note\n 3,q1 ,x\n,q2,\n")
    assert human_scores(tmp_path / "human.csv", {"q1", "q2"}) == {"q1": 3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"units": 0}, "units is 0, allowed is 1 or more"),
        ({"contexts": 1}, "contexts is 1, allowed is 2 to 100"),
        ({"budget": -1.0}, "budget is -1.0, allowed is 0 or more"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"prices": (0.0, float("inf"))}, "prices is inf"),
        ({"second_model": "x"}, "second_model is 'x', but no model"),
        ({"human": "x.csv"}, "human is 'x.csv', but no model"),
        ({"model": "x", "second_model": "x"}, "another one is needed"),
        ({"model": "x", "base_url": "nowhere"}, "base_url is 'nowhere'"),
        ({"budget": 5.0}, "budget is 5.0, but prices are 0 0"),
        ({"contexts": 100, "dry_run": True}, r"contexts is 100, but of 1\d+ training and 40 held-out rows"),
        ({"overrides": ["split.seed=7"]}, "of 40 subjects held out now, '[a-l]{4}' among them, are subjects that"),
        ({"overrides": ["prompts.limit=100"]}, "of 20 subjects held out now"),
    ],
)
def test_arguments_that_do_not_fit_leave_nothing(
    arguments: dict[str, Any], says: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        judge(trained, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_no_subject_held_out_trained_the_atoms(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the recipe they are measured on, and whichever seed they are of."""
    folder = tmp_path / "run" / "blocks.1.hook_resid_post" / "seed-1"
    folder.mkdir(parents=True)
    text = (trained / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    own = load_recipe(trained / "recipe.yaml")
    check_split(folder, own)
    # Half of the subjects that were held out then.
    check_split(folder, load_recipe(trained / "recipe.yaml", ["split.heldout=0.1"]))
    with pytest.raises(ValueError, match=r"[0-9]+ of 80 subjects held out now, .* are subjects that these atoms"):
        check_split(folder, load_recipe(trained / "recipe.yaml", ["split.heldout=0.4"]))
    # Other subjects in the same words are new to them, and where theirs are gone nobody knows.
    lines = [
        json.dumps({"template": "{} is a city in", "subject": f"{s}m"}) for s in ("kl", "la", "ab", "bc", "cd", "de")
    ]
    (tmp_path / "others.jsonl").write_text("\n".join(lines))
    others = [f"prompts.path={tmp_path / 'others.jsonl'}", "split.seed=7"]
    check_split(folder, load_recipe(trained / "recipe.yaml", others))
    assert not caplog.messages
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("prompts.jsonl", "gone.jsonl"))
    check_split(folder, own)
    assert "subjects held out now may have trained these atoms" in caplog.text


def test_without_a_judge_there_is_purity_and_the_run_stays_whole(trained: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "tiny"
    shutil.copytree(trained, run_folder)
    found = judge(run_folder)
    assert found["judge"] is None and json.loads((run_folder / "judge" / "judge.json").read_text()) == found
    assert [p.name for p in (run_folder / "judge").iterdir()] == ["judge.json"]
    assert found["purity"]["all"]["n"] > found["purity"]["heldout"]["n"] > 0
    text = judge_table(found)
    assert "purity, held-out rows: n = " in text and "no judge was asked" in text
    verify(run_folder)
    load_atoms(run_folder)
    assert not any("judge" in name for name in publish(run_folder, "user/tiny", dry_run=True).files)


def test_where_it_is_written(tmp_path: Path) -> None:
    """The only hook of a run has the shortest name; nothing is written over what belongs to another dictionary."""
    for hook, expected in {"a": "judge", "a/seed-1": "judge/a/seed-1", "b": "judge/b"}.items():
        (tmp_path / hook).mkdir()
        (tmp_path / hook / "cfg.json").touch()
        assert _default_out(tmp_path, tmp_path / hook) == tmp_path / expected
    assert _default_out(tmp_path, tmp_path / "a") == tmp_path / "judge/a"


def test_without_answers_there_is_no_purity(run: Callable[..., tuple[int, str, str]]) -> None:  # noqa: F811
    assert run("--quiet")[0] == 0
    found = judge("runs/tiny")
    assert found["purity"] is None and "no purity" in judge_table(found)


def test_kinds_against_dense_codes(trained: Path) -> None:
    """Every kind's codes, from the activations by hand; and purity is that of these codes and the prompts' answers."""
    made = load_recipe(trained / "recipe.yaml")
    atoms = load_atoms(trained)
    read = corpus(made, "blocks.1.hook_resid_post")
    x, held = read.x[:], read.heldout.numpy()
    with torch.no_grad():
        codes = atoms.encode(x).numpy()
    often = [(codes[rows] > 0).sum(axis=0) for rows in (~held, held)]
    # At these rows atoms begin to count, and some do not: the median is of those that do.
    least = tuple(int(np.quantile(part, 0.4)) for part in often)
    per_unit = tuple(int(np.median(part[part >= enough])) for part, enough in zip(often, least, strict=True))
    assert per_unit != tuple(int(np.median(part)) for part in often)
    kinds = read_kinds(atoms, made, read, least, 0)
    np.testing.assert_allclose(kinds["atoms"].toarray(), codes, rtol=1e-6)
    for kind in ("neurons", "random directions", CONTROL, "atoms, as dense"):
        active = kinds[kind].toarray() != 0
        for rows, m in zip((~held, held), per_unit, strict=True):
            assert (active[rows].sum(axis=0) == m).all()
    dense = x.numpy()
    for rows, m in zip((np.flatnonzero(~held), np.flatnonzero(held)), per_unit, strict=True):
        for unit in range(dense.shape[1]):
            best = rows[np.argsort(-dense[rows, unit])[:m]]
            values = kinds["neurons"].toarray()[best, unit]
            np.testing.assert_allclose(values - values[0], dense[best, unit] - dense[best[0], unit], atol=1e-6)
    # Where an atom is active, its reading without a threshold is at its largest.
    by_row = kinds["atoms, as dense"].toarray()
    unit = int(np.argmax(often[0]))
    assert codes[np.flatnonzero(by_row[:, unit])].max(axis=0)[unit] == codes[:, unit].max()
    assert (kinds["data points"].data > 0).all()
    asked = read_kinds(atoms, made, read, least, 0, without=NOT_ASKED)
    assert list(asked) == [kind for kind in kinds if kind not in NOT_ASKED]

    found = label_purity(read, lambda labelled: read_kinds(atoms, made, labelled, least, 0), 0)
    assert found is not None
    labels = np.unique([str(read.prompt(row).answer) for row in range(len(read))], return_inverse=True)[1]
    rows = np.flatnonzero(held)
    assert found["all"]["kinds"]["atoms"] == purity(csc_array(codes), labels).figures
    assert found["heldout"]["kinds"]["atoms"] == purity(csc_array(codes[rows]), labels[rows]).figures


def test_units_that_know_subjects_know_no_labels() -> None:
    """Four rows of every subject, all or none active, and labels that units have nothing to do with."""
    draw = np.random.default_rng(0)
    subjects, units = 300, 400
    labels = draw.integers(0, 8, subjects)
    prompts = [Prompt(f"{s} {i}", str(s), answer=str(labels[s])) for s in range(subjects) for i in range(4)]
    heldout = torch.arange(subjects).repeat_interleave(4) % 2 == 0
    places = torch.tensor([[i, 0, 1] for i in range(len(prompts))])
    active = draw.random((subjects, units)) < 0.1

    def codes(read: Corpus) -> dict[str, csc_array]:
        subject = [int(str(read.prompt(row).subject)) for row in range(len(read))]
        return {"planted": csc_array(active[subject] * draw.random((len(subject), units)))}

    found = label_purity(Corpus(Rows(torch.zeros(len(prompts), 1)), prompts, places, heldout), codes, 0)
    assert found is not None and found["all"]["n"] == subjects and found["heldout"]["n"] == subjects // 2
    for split in found.values():
        for score in ("information", "purity"):
            assert split["kinds"]["planted"][score]["above_null"] < 0.1


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.integers(0, 1000))
def test_the_strongest_rows_against_sorting(n: int, d: int, batch: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    # Columns of either sign, and such that are always negative.
    x = (draw.normal(size=(n + 2, d)) - draw.choice([0, 10], d)).astype(np.float32)
    held = draw.permutation(np.arange(n + 2) % 3 == 0)
    basis: Basis = neurons(torch.from_numpy(x))
    codes = strongest(basis, Rows(torch.from_numpy(x)), torch.from_numpy(held), (3, 2), batch)
    found = codes.toarray()
    for unit in range(d):
        assert (np.diff(x[active_rows(codes, unit)[0], unit]) <= 0).all(), "the largest first"
    for rows, m in ((np.flatnonzero(~held), 3), (np.flatnonzero(held), 2)):
        for unit in range(d):
            best = set(rows[np.argsort(-x[rows, unit])[:m]].tolist())
            assert set(np.flatnonzero(found[:, unit])) & set(rows.tolist()) == best


def test_features_of_the_recipe_stand_beside(trained: Path, tmp_path: Path) -> None:
    """Another SAE on the same hook, and one that is too wide, which is one sentence."""
    folder = trained / "blocks.1.hook_resid_post"
    override = f"compare.features=[{{name: mine, path: {folder}}}]"
    found = judge(trained, overrides=[override], out=trained.parent / "with-features", dry_run=True, **SMALL)
    assert found["purity"]["all"]["kinds"]["features mine"] == found["purity"]["all"]["kinds"]["atoms"]
    assert found["judge"]["living"]["features mine"] == found["judge"]["living"]["atoms"]
    assert found["judge"]["estimate"]["questions"] == 2 * 5 * 4
    StandardSAE(StandardSAEConfig(d_in=5, d_sae=4)).save_model(tmp_path / "wide")
    with pytest.raises(ValueError, match="features 'wide' are 5 wide, the activations of blocks.1.hook_resid_post 16"):
        judge(trained, overrides=[f"compare.features=[{{name: wide, path: {tmp_path / 'wide'}}}]"], out=tmp_path / "o")
    elsewhere = SAEMetadata(hook_name="blocks.0.hook_resid_post")
    StandardSAE(StandardSAEConfig(d_in=16, d_sae=4, metadata=elsewhere)).save_model(tmp_path / "deep")
    with pytest.raises(
        ValueError, match="features 'deep' are of hook 'blocks.0.hook_resid_post', the atoms of 'blocks.1"
    ):
        judge(trained, overrides=[f"compare.features=[{{name: deep, path: {tmp_path / 'deep'}}}]"], out=tmp_path / "o")


@pytest.mark.slow
@pytest.mark.demo
def test_transformers_serve(demo: str, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that people run, with a base model that cannot do the task: its answers are counted as unread."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'transformers[serving]'")
    # A base model has no chat template, without which the server answers 500 to every chat.
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(demo).iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("atom_lens.studies.judge.asking._RUBRIC_TOKENS", 12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", process, tmp_path / "log.txt")
        arguments: dict[str, Any] = {"model": str(model), "base_url": f"{url}/v1", "out": tmp_path / "out"}
        found = judge(trained, units=1, contexts=2, **arguments)["judge"]
        assert found["complete"] and found["asked_now"] == found["answered"] >= 4
        assert found["written"] > 0 and found["read"] > 100 * found["answered"]
        assert all(one["rubric"]["unparsed"] in (0.0, 1.0) for one in found["kinds"].values())
        again = judge(trained, units=1, contexts=2, **arguments)["judge"]
        assert again["asked_now"] == 0 and again["kinds"] == found["kinds"]
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"the server is not there after two minutes: {log.read_text()}")
