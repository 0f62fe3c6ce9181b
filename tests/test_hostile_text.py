"""Prompts, answers and names of any kind of text: on the page, in tables, in the terminal."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_model
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.browser import Browser

from atom_lens import open_model, train
from atom_lens.activations.prompts.cities import Cities
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.cli import _Formatter, main
from atom_lens.evidence.results import Report
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import check_recipe, load_recipe
from atom_lens.sharing.card import merged_card, run_card
from atom_lens.storage.files import visible
from atom_lens.storage.terminal import say
from atom_lens.studies.report.run import write_page
from atom_lens.studies.report.words import columns, lens_of
from atom_lens.views.table import aligned

HOOK = "blocks.1.hook_resid_post"
TEXTS = {
    "script": "</script><script>pwned=1</script>",
    "comment": "<!--<script>",
    "image": "<img src=x onerror=pwned=1>",
    "control": "a\x00b\x07c\x1b[31md\x9b0m\x7fe",
    "rtl": "שלום مرحبا",
    "override": "abc\u202edcba",
    "isolate": "\u2067x",
    "unseen": "a\u200bb\ufeffc\u2028d\u2029e",
    "lines": "a\nb\r\nc\td",
    "entity": "&lt;b&gt;&amp;&#x41;",
    "template": "{{ 7*7 }}{% for x in y %}{# c #}${x}",
    "emoji": "👩\u200d👩\u200d👧🇫🇷 東京",
    "blanks": "\u3000\xa0x",
    "long": "word " * 2000 + "end",
    "longword": "x" * 10_000,
    "proto": "__proto__",
}
NAME = "a  <b>b<i> %{x} &amp; <!--<script>\u202ez"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two folders of one run on such texts, of a model whose vocabulary has some, too; one with a name like them."""
    folder = tmp_path_factory.mktemp("hostile")
    model = save_tiny_model(folder / "tiny")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    texts = [TEXTS[key] for key in ("script", "control", "rtl", "override", "unseen", "lines")]
    new = dict(zip((f"##{c}" for c in "!$%'(*"), texts, strict=True))  # pieces that no text here has
    tokenizer["model"]["vocab"] = {new.get(word, word): at for word, at in tokenizer["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [{"template": "{} is in", "subject": f"{a}{b}", "answer": "Italy"} for a in "abcdef" for b in "abcdef"]
    for name, text in TEXTS.items():
        rows.append({"text": f"{text} is", "subject": text, "answer": text} if len(text) < 50 else {"text": text})
        rows[-1].setdefault("answer", text)
        rows.append({"text": f"X{name} and {text}", "subject": f"X{name}", "answer": text})
    for row in rows:
        row.setdefault("subject", row.get("text", "")[:9])
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "name": "run",
        "model": {"name": str(model), "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(folder / "prompts.jsonl")},
        "hooks": [HOOK],
        "atoms": {"capacity": 40, "target_l0": 6.0},
        "training": {"steps": 5, "batch_size": 16, "device": "cpu", "nulls": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOM_LENS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        run = train(check_recipe(recipe))
        shutil.copytree(run, folder / "runs" / NAME)
        report = json.loads((run / "report.json").read_text())
        report["model"] = "m\ud800</script>\x1b[31m"  # the others' JSON may hold half a surrogate pair
        (run / "report.json").write_text(json.dumps(report))
        yield folder


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    return write_page([made / "runs" / NAME, made / "runs" / "run"], made / "page.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_shows_any_text_as_text(browser: Browser, made: Path, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.js("document.title") == f"{visible(NAME)}, run · atom-lens".replace("  ", " ")
    assert browser.js("document.querySelector('h1').textContent") == f"{visible(NAME)}, run"
    heads = browser.js("[...document.querySelectorAll('#results-and-nulls h3')].map(head => head.textContent)")
    assert any("m\\ud800</script>\\x1b[31m" in head for head in heads)
    # What is chosen is found again, blanks and all, and a name in a figure is neither markup nor a template.
    shown = "document.querySelectorAll('.panel:not([hidden]) .plot:not([hidden])').length"
    assert browser.js(shown) == browser.js("document.querySelectorAll('.panel').length") == 3

    read = corpus(load_recipe(made / "runs" / "run" / "recipe.yaml"), HOOK)
    contexts = {visible(prompt.text, keep="\n\t") for prompt in read.prompts if len(prompt.text) < 100}
    answers = {f"answer: {visible(str(prompt.answer))}" for prompt in read.prompts if len(str(prompt.answer)) < 100}
    seen: set[str] = set()
    for atom in browser.search(""):
        browser.js(f"document.querySelector('#list tr[data-atom=\"{atom}\"]').click()")
        texts = browser.js("[...card.querySelectorAll('.context')].map(context => context.textContent)")
        seen |= {text for text in texts if "…" not in text}
        said = browser.js("[...card.querySelectorAll('.answer')].map(answer => answer.textContent)")
        assert {text for text in said if "…" not in text} <= answers and max(map(len, said)) <= 8 + 10 * 120
    assert seen <= contexts and len(seen & {text for text in contexts if " is in" not in text}) > 10
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js("card.scrollWidth <= card.clientWidth")
    assert browser.js("document.images.length") == 0 and browser.js("typeof pwned") == "undefined"
    assert browser.troubles == [] and set(browser.requests) == {page.resolve().as_uri()}


def test_text_from_right_to_left_stays_by_itself(browser: Browser, page: Path) -> None:
    """Subjects in a list keep their order, answers their label; a context begins where its own script does."""
    browser.open(page)
    found = {}
    for atom in browser.search(TEXTS["rtl"]):
        row = f"document.querySelector('#list tr[data-atom=\"{atom}\"]')"
        edges = browser.js(f"[...{row}.querySelectorAll('.text bdi')].map(part => part.getBoundingClientRect().left)")
        assert edges and edges == sorted(edges)
        browser.js(f"{row}.click()")
        found |= browser.js(
            "Object.fromEntries([...card.querySelectorAll('.context')].map(line =>"
            " [line.textContent, getComputedStyle(line).direction]))"
        )
    assert found[f"{TEXTS['rtl']} is"] == "rtl" and found[f"Xrtl and {TEXTS['rtl']}"] == "ltr"
    assert browser.js("[...card.querySelectorAll('.answer')].every(answer => answer.querySelector('bdi'))")


def test_a_page_is_not_as_long_as_its_prompts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "x" * 200 not in text and "word " * 60 not in text
    before = text.partition('id="figures-data"')[0]  # plotly draws names, not all that is beside them
    assert {c for c in before if unicodedata.category(c) in ("Cc", "Cf")} == {"\n", "\u200d"}


def test_words_of_the_lens_can_be_seen(made: Path) -> None:
    lens = lens_of(open_model(str(made / "tiny"), device="cpu"))
    table = columns(lens, lens.weights.T[:, :].contiguous())["table"]
    assert {visible(TEXTS[key]) for key in ("control", "override", "unseen", "lines")} <= set(table)


def test_what_has_no_look_is_escaped() -> None:
    assert visible("a\x1b[31m\u202e\u200b\u2028\ud800\x00") == "a\\x1b[31m\\u202e\\u200b\\u2028\\ud800\\x00"
    assert visible("a\nb\tc") == "a\\nb\\tc" and visible("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    for text in ("Île-de-France R² – …", TEXTS["rtl"], TEXTS["emoji"], TEXTS["blanks"], "می\u200cخواهم", "é", ""):
        assert visible(text) == text


@given(st.text(st.characters()))
def test_what_was_escaped_stays_as_it_is(text: str) -> None:
    once = visible(text)
    assert visible(once) == once and once.encode().decode() == once and len(once.splitlines()) <= 1


def test_prompts_of_half_a_surrogate_pair() -> None:
    for arguments in ({"text": "a\ud800b"}, {"text": "a b", "answer": "\udfff"}):
        with pytest.raises(ValueError, match=r"a prompt has '[ab?]+', half a surrogate pair, which is not text"):
            Prompt(**arguments)


def test_nothing_that_a_terminal_obeys_reaches_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of a folder that came from somebody else, errors about prompts, and what is logged."""
    atoms = made / "runs" / "run"
    report = json.loads((atoms / "report.json").read_text())
    prompts = made / "no subject.jsonl"
    prompts.write_text(json.dumps({"text": f"{TEXTS['control']}{TEXTS['override']} {'word ' * 5000}"}))
    overrides = [f"prompts.path={prompts}", "name=other"]
    assert main(["train", str(atoms / "recipe.yaml"), *overrides]) == 2
    error = capsys.readouterr().err
    assert "needs a subject, the prompt " in error and len(error) < 500 and error.removesuffix("\n").isprintable()
    assert main(["report", str(made / "runs" / NAME), "--out", str(made / "p\x1b[2J.html")]) == 0
    assert capsys.readouterr().out.endswith("p\\x1b[2J.html\n")
    record = logging.LogRecord("atom_lens", logging.INFO, "", 0, "%s read", (report["model"],), None)
    assert _Formatter("%(message)s").format(record) == "m\\ud800</script>\\x1b[31m read"


def test_a_terminal_without_such_letters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of work do not end in an error because the table has a ²."""
    monkeypatch.setattr("sys.stdout", _Ascii(sys.stdout))
    say("R² of 東京")
    assert capsys.readouterr().out == "R\\xb2 of \\u6771\\u4eac\n"


class _Ascii:
    encoding = "ascii"

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        self.stream.write(text.encode("ascii").decode())


def test_columns_stand_below_each_other() -> None:
    """A wide character takes two places; a line break in a name breaks no table."""
    lines = aligned([["", "x", "y"], ["東京", "1", "2"], ["ab\ncd", "10", "20"]]).splitlines()
    assert lines == ["         x   y", "------  --  --", "東京     1   2", "ab\\ncd  10  20"]


@pytest.mark.parametrize(
    "text", [*TEXTS.values(), "a ` b `` c\n---\nx: y\n---\n# d", "<!-- end of what atom-lens wrote -->"]
)
def test_a_card_shows_any_text_as_text(made: Path, text: str) -> None:
    """As a reader of Markdown sees it; and the metadata are ours alone."""
    recipe = load_recipe(made / "runs" / "run" / "recipe.yaml")
    report = Report.read(made / "runs" / "run" / "report.json").model_copy(update={"model": text})
    prompts = Cities(source="cities", template=f"{{}} {text}")
    card = run_card({HOOK: report}, "user/run", recipe.model_copy(update={"prompts": prompts}), text)
    assert merged_card(card, card) == merged_card(card, merged_card(card, card))
    metadata = ModelCard(card).data.to_dict()
    assert set(metadata) == {"library_name", "license", "tags"} and metadata["license"] == text
    tokens = MarkdownIt().parse(ModelCard(card).text)
    assert sum(token.type == "heading_open" for token in tokens) == 4 and not any(t.type == "hr" for t in tokens)
    assert sum(token.type == "html_block" for token in tokens) == 2, "the marks around what is ours"
    children = [child for token in tokens for child in token.children or ()]
    spans = [child.content for child in children if child.type == "code_inline"]
    assert spans[0] == visible(text) and spans[2] == f"source='cities', template={visible(repr(prompts.template))}"
    assert not any(child.type == "html_inline" for child in children)
