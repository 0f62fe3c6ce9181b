"""Text from files: byte-order marks, where lines end, and what is no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atom_lens import harvest
from atom_lens.activations.prompts.files import HubDataset, JsonLines, TextFile
from atom_lens.recipe.reading import load_recipe
from atom_lens.storage.text import read_text

Read = Callable[[Path], list[str]]


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in TextFile(path=str(path)).read()]


def rows(path: Path) -> list[str]:
    return [prompt.text for prompt in JsonLines(path=str(path)).read()]


def recipe_names(path: Path) -> list[str]:
    return [load_recipe(path).name]


RECIPE = "name: x\nmodel: {name: m}\nprompts: {source: cities}\nhooks: [blocks.1.hook_resid_post]\n"
WRITTEN: list[tuple[Read, str, list[str]]] = [
    (texts, "Paris is\nRome is\n", ["Paris is", "Rome is"]),
    (rows, '{"text": "Paris is"}\n\n{"text": "Rome is"}\n', ["Paris is", "Rome is"]),
    (recipe_names, RECIPE, ["x"]),
]


@pytest.mark.parametrize(("read", "written", "expected"), WRITTEN)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_and_line_ends(
    read: Read, written: str, expected: list[str], newline: str, encoding: str, tmp_path: Path
) -> None:
    """What Excel, Notepad and old Macs write; the mark is no part of the first prompt."""
    path = tmp_path / "file"
    path.write_bytes(written.replace("\n", newline).encode(encoding))
    assert read(path) == expected


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_what_else_unicode_calls_a_line_end_is_text(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    text = f"Paris{separator}is"
    path.write_text(f"{text}\n", encoding="utf-8")
    assert texts(path) == [text]
    path.write_text(json.dumps({"text": text}, ensure_ascii=separator < " ") + "\n", encoding="utf-8")
    assert rows(path) == [text]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is not a JSON object: it is nested too deep"),
        ('{"text": ' + '{"a": ' * 100_000, "is not a JSON object: it is nested too deep"),
        ('{"text": "Rome", "text": "Oslo"}', "is not a JSON object: a key of text is repeated"),
        ('{"text": "Rome", "n": NaN}', "is not a JSON object: NaN is not JSON"),
        ('["Rome"]', "is not a JSON object: it holds a list, a mapping is needed"),
        ('{"text": "Rome', "is not a JSON object: Unterminated string"),
        ('{"text": "Rome is", "subject": "Bonn"}', ": subject 'Bonn' is not in the prompt 'Rome is'"),
        ('{"text": "\\ud800"}', ": a prompt has '\\?', half a surrogate pair"),
        ('{"template": "is", "subject": "Rome"}', ": template 'is' must contain {} exactly once"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "Paris is"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"facts.jsonl line 3{message if message[0] == ':' else ' ' + message}"):
        JsonLines(path=str(path)).read()


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    """A misspelt column of answers would leave all prompts without."""
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "Paris is"}\n{"text": "Rome is", "target": {"str": "Italy"}}\n')
    assert [p.answer for p in JsonLines(path=str(path), columns={"answer": "target.str"}).read()] == [None, "Italy"]
    with pytest.raises(ValueError, match="columns.answer is 'target.true', which none of the 2 rows has"):
        JsonLines(path=str(path), columns={"answer": "target.true"}).read()
    (tmp_path / "data").mkdir()
    path.rename(tmp_path / "data" / "train.jsonl")
    with pytest.raises(ValueError, match="columns.answer is 'goal', which none of the 2 rows has"):
        HubDataset(path=str(tmp_path / "data"), columns={"answer": "goal"}).read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Paris\n\xe9t\xe9\n", "is not text in UTF-8 at byte 6, in line 2: invalid"),
        ("Paris\nRome".encode("utf-16-le"), "is not text: there is a NUL in line 1"),
        (b"\xff\xfea", "is not text in UTF-16 at byte 2, in line 1: truncated data"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    readers = (read_text, lambda p: TextFile(path=str(p)).read(), lambda p: JsonLines(path=str(p)).read(), load_recipe)
    for reader in readers:
        with pytest.raises(ValueError) as error:
            reader(path)
        assert str(path) in str(error.value) and message in str(error.value)


def test_a_harvest_of_such_a_file(tiny: str, tmp_path: Path) -> None:
    """The first prompt reads as the others do."""
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfParis is\nParis is\n")
    x = harvest(
        tiny, TextFile(path=str(path)).read(), "blocks.1.hook_resid_post", "last", store=tmp_path, massive_ratio=None
    )
    assert torch.equal(*x["blocks.1.hook_resid_post"])
