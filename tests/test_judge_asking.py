"""How a judge is asked: failures, keys, caches, and a model that transformers serves."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.judging import KEY, Server, ask

from atom_lens.cli import main
from atom_lens.studies.judge.client import Budget, Judge
from atom_lens.studies.judge.run import judge
from atom_lens.studies.judge.scoring import read_rubric


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
    judging: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan(["ok"] * 5 + ["401"])
    command = ["judge", str(judging), "--model", "m", "--base-url", server.url, "--latents", "4", "--contexts", "2"]
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


@pytest.mark.slow
@pytest.mark.demo
def test_transformers_serve(demo: str, tmp_path: Path, judging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        found = judge(judging, latents=1, contexts=2, **arguments)["judge"]
        assert found["complete"] and found["asked_now"] == found["answered"] >= 4
        assert found["written"] > 0 and found["read"] > 100 * found["answered"]
        assert all(one["rubric"]["unparsed"] in (0.0, 1.0) for one in found["kinds"].values())
        again = judge(judging, latents=1, contexts=2, **arguments)["judge"]
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
