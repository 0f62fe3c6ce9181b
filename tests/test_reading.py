"""Text from files: what begins with a byte-order mark, where lines end, and what is no text in UTF-8."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from atom_lens.activations.prompts import hub_dataset, jsonl_file, text_file
from atom_lens.training.recipe_file import load_recipe

Read = Callable[[Path], list[str]]


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in text_file(path)]


def rows(path: Path) -> list[str]:
    return [prompt.text for prompt in jsonl_file(path)]


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
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_marks_and_line_ends(
    read: Read, written: str, expected: list[str], newline: str, mark: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(mark + written.replace("\n", newline).encode())
    assert read(path) == expected


@pytest.mark.parametrize(("read", "written", "expected"), WRITTEN)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_another_encoding_is_refused_with_its_line(
    read: Read, written: str, expected: list[str], mark: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(written.encode(encoding))
        with pytest.raises(ValueError, match="file' line 1 is not text in UTF-8: it has a byte 0x"):
            read(path)
    for wrong, byte in (("Besançon".encode("latin-1"), "0xe7"), (b"\0", "0x00"), (b"\xed\xa0\x80", "0xed")):
        path.write_bytes(mark + written.encode() + b"\n" + wrong)
        line = written.count("\n") + 2
        with pytest.raises(ValueError, match=f"file' line {line} is not text in UTF-8: it has a byte {byte}$"):
            read(path)


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
        ("[" * 100_000, "is not strict JSON: it is nested too deep"),
        ('{"text": ' + '{"a": ' * 100_000, "is not strict JSON: it is nested too deep"),
        ('{"text": "Rome", "text": "Oslo"}', "is not strict JSON: a key of text stands twice"),
        ('{"text": "Rome", "n": NaN}', "is not strict JSON: NaN is not JSON"),
        ('["Rome"]', "is not strict JSON: it holds a list, a mapping is needed"),
        ('{"text": "Rome', "is not strict JSON: Unterminated string"),
        ('{"text": "Rome is", "subject": "Bonn"}', ": subject 'Bonn' is not in the prompt 'Rome is'"),
        ('{"text": "\\ud800"}', ": a prompt has '\\?', half a surrogate pair"),
        ('{"template": "is", "subject": "Rome"}', ": template 'is' must contain {} exactly once"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "Paris is"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"facts.jsonl line 3{message if message[0] == ':' else ' ' + message}"):
        jsonl_file(path)


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    """A misspelt column of answers would leave all prompts without."""
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "Paris is"}\n{"text": "Rome is", "target": {"str": "Italy"}}\n')
    assert [p.answer for p in jsonl_file(path, columns={"answer": "target.str"})] == [None, "Italy"]
    with pytest.raises(ValueError, match="columns.answer is 'target.true', which none of the 2 rows has"):
        jsonl_file(path, columns={"answer": "target.true"})
    (tmp_path / "data").mkdir()
    path.rename(tmp_path / "data" / "train.jsonl")
    with pytest.raises(ValueError, match="columns.answer is 'goal', which none of the 2 rows has"):
        hub_dataset(str(tmp_path / "data"), columns={"answer": "goal"})


def test_a_recipe_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("name: " + "[" * 5000)
    with pytest.raises(ValueError, match=r"deep.yaml is not YAML: it is nested too deep"):
        load_recipe(path)
