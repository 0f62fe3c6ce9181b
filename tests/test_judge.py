"""Judging: a real server on loopback that may fail, planted concepts with a known verdict, and transformers serve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judging import KEY, SMALL, Server, kappa, planted_concepts

from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.studies.judge.asking import ask_all
from atom_lens.studies.judge.client import Budget, Judge, estimated_tokens
from atom_lens.studies.judge.kinds import CONTROL
from atom_lens.studies.judge.run import _default_out, judge
from atom_lens.studies.judge.sampling import draw_cases, marked
from atom_lens.studies.judge.tables import judge_table


def test_a_whole_study_and_again_from_the_cache(judging: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = judge(judging, model="m", base_url=server.url, out=out, second_model="other", **SMALL)
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
    scores = np.array([one["score"] for one in judged["latents"]])
    opposite = judged["agreement"]["second_model"]
    assert opposite["n"] == 16 == len(scores) and opposite["unparsed"] == 0
    assert opposite["spearman"] == pytest.approx(-1) and opposite["kappa"] == pytest.approx(kappa(scores, 6 - scores))
    assert {request["body"]["model"] for request in server.requests} == {"m", "other"}
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
        assert request["body"]["temperature"] == 0 and request["body"]["max_tokens"] in (100, 200)
    asked = len(server.requests)
    again = judge(judging, model="m", base_url=server.url, out=out, second_model="other", **SMALL)
    assert len(server.requests) == asked and again["judge"]["asked_now"] == 0
    assert {**again["judge"], "asked_now": asked} == judged
    assert "0 asked now" in judge_table(again)


def test_the_judge_is_told_nothing(judging: Path, server: Server, tmp_path: Path) -> None:
    """No kind, no index, nothing of the model; kinds are asked about in mixed order, another one with another seed."""
    read = corpus(load_recipe(judging / "recipe.yaml"), "blocks.1.hook_resid_post")
    texts = {marked(read, row) for row in range(len(read))}
    found = [
        judge(judging, model="m", base_url=server.url, out=tmp_path / str(seed), seed=seed, **SMALL)["judge"]["latents"]
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


def test_a_dry_run_asks_and_writes_nothing(judging: Path, server: Server, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    found = judge(judging, dry_run=True, prices=(1.0, 2.0), **arguments)
    assert server.requests == [] and not (tmp_path / "out").exists()
    estimate = found["judge"]["estimate"]
    assert "nothing was asked (dry run)" in judge_table(found)
    asked = judge(judging, **arguments)["judge"]
    assert estimate["questions"] == asked["questions"] == len(server.requests)
    tokens = sum(len(request["body"]["messages"][0]["content"].encode()) for request in server.requests) / 3
    assert estimate["read"] == pytest.approx(tokens, rel=0.2) and estimated_tokens("北京") == 2
    assert estimate["written_at_most"] == sum(request["body"]["max_tokens"] for request in server.requests)
    assert estimate["dollars_at_most"] == pytest.approx((estimate["read"] + 2 * estimate["written_at_most"]) / 1e6)


def test_the_budget_holds_and_more_goes_on(judging: Path, server: Server, tmp_path: Path) -> None:
    """100 tokens read at a dollar each thousand: a few questions fit into a dollar, and the study says it is cut."""
    arguments: dict[str, Any] = {"model": "m", "base_url": server.url, "out": tmp_path / "out", **SMALL}
    arguments["prices"] = (1000.0, 0.0)
    found = judge(judging, budget=1.0, **arguments)["judge"]
    assert not found["complete"] and 0 < found["answered"] == len(server.requests) < found["questions"]
    assert found["dollars"] == pytest.approx(0.1 * found["answered"]) and found["dollars"] <= 1
    asked = found["answered"]
    # What was paid before counts: the same budget asks nothing more.
    same = judge(judging, budget=1.0, **arguments)
    assert len(server.requests) == asked and "INCOMPLETE" in judge_table(same)
    # So does what was paid for other questions; what is not the price of anything does not.
    (tmp_path / "out" / "blind.csv").unlink()
    (tmp_path / "out" / "cache" / "refund.json").write_text('{"answer": "", "read": -1000000, "written": 0}')
    others = judge(judging, budget=1.0, seed=1, **arguments)["judge"]
    assert others["asked_now"] == 0 and others["dollars"] == pytest.approx(found["dollars"])
    assert f"${found['dollars']:.4f} of $1.00" in judge_table(same)
    (tmp_path / "out" / "blind.csv").unlink()
    more = judge(judging, budget=100.0, **arguments)["judge"]
    assert more["complete"] and len(server.requests) == more["questions"]


def test_what_cannot_be_read_is_counted_not_guessed(judging: Path, server: Server, tmp_path: Path) -> None:
    """Every rubric is answered in prose, so no detection can be asked."""
    server.plan(["prose"] * 1000)
    found = judge(judging, model="m", base_url=server.url, out=tmp_path / "out", **SMALL)["judge"]
    assert found["complete"] and len(server.requests) == found["questions"] == 16
    for one in found["kinds"].values():
        assert one["rubric"] == {
            **{"asked": 4, "unparsed": 1.0, "n": 0, "mean": None, "interval": None},
            **{"above_control": None, "above_control_interval": None},
        }
        assert one["detection"]["asked"] == 0 and one["detection"]["unparsed"] is None
    assert "none" in judge_table({**judge(judging, out=tmp_path / "o"), "judge": found})


def test_planted_concepts_get_the_verdict_they_deserve(server: Server, tmp_path: Path) -> None:
    """An oracle of letters on the whole way: score 5 and accuracy 1 for letters, 1 and chance for anything else."""
    made, codes, heldout = planted_concepts()
    cases, living = draw_cases(codes, heldout, latents=6, contexts=8, seed=0)
    assert living == {"planted": 6, CONTROL: 6}
    one = Judge("m", server.url, tmp_path / "cache", Budget(1.0, (0.0, 0.0)))
    found = ask_all(cases, made, [one], None, tmp_path, 0)["kinds"]
    assert found["planted"]["rubric"]["mean"] == 5 and found["planted"]["detection"]["mean"] == 1
    assert found[CONTROL]["rubric"]["mean"] == 1 and found[CONTROL]["detection"]["mean"] == pytest.approx(0.5, abs=0.2)
    assert found["planted"]["rubric"]["above_control_interval"] == [4, 4]
    low, high = found["planted"]["detection"]["above_control_interval"]
    above = found["planted"]["detection"]["above_control"]
    assert 0 < low <= above <= high and above == pytest.approx(1 - found[CONTROL]["detection"]["mean"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"latents": 0}, "latents is 0, allowed is 1 or more"),
        ({"contexts": 1}, "contexts is 1, allowed is 2 to 100"),
        ({"budget": -1.0}, "budget is -1.0, allowed is 0 or more"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"prices": (0.0, float("inf"))}, "prices is inf"),
        ({"second_model": "x"}, "second_model is 'x', but no model"),
        ({"human": "x.csv"}, "human is 'x.csv', but no model"),
        ({"model": "x", "second_model": "x"}, "another one is needed"),
        ({"model": "x", "base_url": "nowhere"}, "base_url is 'nowhere'"),
        ({"budget": 5.0}, "budget is 5.0, but prices are 0 0"),
        ({"contexts": 100, "dry_run": True}, r"contexts is 100, too many .* from 1\d+ training and 40 held-out rows"),
        ({"overrides": ["split.seed=7"]}, "of 40 subjects held out now, such as '[a-l]{4}', are subjects that"),
        ({"overrides": ["prompts.limit=100"]}, "of 20 subjects held out now"),
    ],
)
def test_arguments_that_do_not_fit_leave_nothing(
    arguments: dict[str, Any], says: str, judging: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        judge(judging, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_where_it_is_written(tmp_path: Path) -> None:
    """The only hook of a run has the shortest name; nothing is written over what belongs to another dictionary."""
    for hook, expected in {"a": "judge", "a/seed-1": "judge/a/seed-1", "b": "judge/b"}.items():
        (tmp_path / hook).mkdir()
        (tmp_path / hook / "cfg.json").touch()
        assert _default_out(tmp_path, tmp_path / hook) == tmp_path / expected
    assert _default_out(tmp_path, tmp_path / "a") == tmp_path / "judge/a"
