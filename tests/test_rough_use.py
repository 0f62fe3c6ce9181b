"""Rough use: outputs that cannot be written, interrupted commands, secrets in what others say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from atom_lens import cli
from atom_lens.dictionaries.load import _asked
from atom_lens.errors import AtomLensError
from atom_lens.sharing.publish import _commit
from atom_lens.storage.files import check_writable, without_secrets

TOKEN = "hf_" + "secret" * 6


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("evaluate", "atom_lens.studies.evaluate.evaluate_folder"),
        ("planted", "atom_lens.studies.planted.run.planted"),
        ("shift", "atom_lens.studies.shift.shift"),
    ],
)
@pytest.mark.parametrize(("place", "message"), [("folder", "a folder"), ("file/x.png", "not a folder")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: str,
    work: str,
    place: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, lambda *arguments: pytest.fail("the work was begun"))
    assert cli.main([command, "x.yaml", "--json", place]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--json is {place!r}" in err and message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_in_a_folder_to_be_made_is_allowed(tmp_path: Path) -> None:
    check_writable("--json", tmp_path / "new" / "deep" / "x.json")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_publish_claims_nothing_about_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atom_lens.sharing.publish.publish", interrupted)
    assert cli.main(["publish", "run", "me/atoms"]) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing was written" not in err and "old commit or at the new one" in err


@pytest.mark.parametrize("given", [True, False])
def test_what_the_hub_says_shows_no_token(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    class Refusing(HfApi):
        def create_repo(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError(f"401 for https://me:{TOKEN}@host/x?token={TOKEN}, authorization: Bearer {TOKEN}")

    with pytest.raises(ValueError, match="did not complete, try again: 401 for") as caught:
        _commit(Refusing(token=TOKEN if given else None), "me/atoms", {}, "", False, "")
    assert "secret" * 6 not in str(caught.value)


def test_secrets_are_left_out_of_text() -> None:
    text = without_secrets("http://me:pw@host/v1 said {'authorization': 'Bearer other-key-1'} and key", "key-of-mine")
    assert text == "http://[secret]@host/v1 said {'authorization': 'Bearer [secret]'} and key"
    assert without_secrets("a bearer of news, see https://host/@me") == "a bearer of news, see https://host/@me"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"])
def test_no_command_prints_a_key_of_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise AtomLensError(f"the server said: no such key {TOKEN}")

    monkeypatch.setenv(name, TOKEN)
    monkeypatch.setattr("atom_lens.sharing.convert.convert", refused)
    assert cli.main(["convert", "x", "y"]) == 2
    assert capsys.readouterr().err == "atom-lens convert: the server said: no such key [secret]\n"


def test_loading_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Any:
        raise RuntimeError(f"401 for https://me:{TOKEN}@host/x, authorization: Bearer {TOKEN}")

    with pytest.raises(ValueError, match="the Hub provides: 401 for") as caught:
        _asked("me/atoms", None, refused)
    assert TOKEN not in str(caught.value)
