"""The page of an audit: every latent of every dictionary is there, with what it fires on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from conftest import shifted
from support.auditing import HOOK, topk
from support.browser import Browser

from atom_lens.cli import main
from atom_lens.studies.audit.result import Audit
from atom_lens.studies.audit.run import audit


@pytest.fixture
def page(tiny: str, stock: Path, text: Path, tmp_path: Path) -> Path:
    """Of two dictionaries, from the command line."""
    about = {"model_name": tiny, "hook_name": HOOK, "context_size": 16, "prepend_bos": True}
    topk(seed=1, **about).save_model(tmp_path / "other")
    options = ["--text", str(text), "--tokens", "1500", "--loss-tokens", "0", "--device", "cpu"]
    files = ["--json", str(tmp_path / "audit.json"), "--page", str(tmp_path / "audit.html")]
    assert main(["audit", str(stock), "--other", str(tmp_path / "other"), *options, *files]) == 0
    return tmp_path / "audit.html"


def test_numbers_are_kept_where_a_page_fails(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("atom_lens.studies.audit.run.write_page", fails)
    x, file = shifted(400, 16, generator), tmp_path / "audit.json"
    with pytest.raises(MemoryError):
        audit(topk(), x[:300], x[300:], json=file, page=tmp_path / "audit.html")
    assert Audit.read(file).n_heldout == 100


def browsers(page: Path) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="atoms-\d+">(.*?)</script>', page.read_text(), re.S)
    return [json.loads(one) for one in found]


def test_its_numbers_are_those_of_the_audit(page: Path, text: Path) -> None:
    """Counts of latents add up to L0, scores to PW-MCC, and a context is a place in the text."""
    result = json.loads(page.with_suffix(".json").read_text())
    both = browsers(page)
    assert len(both) == len(result["dictionaries"]) == 2
    for data, one in zip(both, result["dictionaries"], strict=True):
        own = one["own"]["figures"]
        assert len(data["train"]) == len(data["mean"]) == 40 and data["other"] == "metric"
        assert data["n_heldout"] == result["n_heldout"] and data["n_train"] == result["n"]
        assert sum(data["heldout"]) / data["n_heldout"] == pytest.approx(own["l0"]["mean"])
        assert sum(count == 0 for count in data["heldout"]) == own["dead_atoms"]
        scores = torch.tensor([score for score in data["identity"] if score is not None])
        living = 40 - own["dead_atoms"]
        assert len(scores) == living
        (agreement,) = result["agreement"]
        fewest = min(40 - each["own"]["figures"]["dead_atoms"] for each in result["dictionaries"])
        expected = agreement["figures"]["pw_mcc"] * fewest / living
        assert float(scores.mean()) == pytest.approx(expected, rel=1e-3)
        assert all(value is None for value in data["margin"]), "it has no threshold"
        assert len(data["words"]["up"]) == 8 * 40
        rows, documents = data["rows"], text.read_text()
        for before, token, after in zip(rows["before"], rows["token"], rows["after"], strict=True):
            assert f"{before}{token}{after}".strip("…") in documents


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert not browser.troubles and len(browser.requests) == 1
    heads = browser.js("[...document.querySelectorAll('#list thead button')].map(head => head.textContent)")
    assert heads[:3] == ["atom", "held-out ↓", "metric"] and "identity" in heads and "margin" not in heads
    assert len(browser.listed()) == 25
    assert browser.js("document.documentElement.scrollWidth") <= width


def test_given_activations_have_tables_alone(generator: torch.Generator, tmp_path: Path) -> None:
    x = shifted(800, 16, generator)
    audit(topk(), x[:500], x[500:], page=tmp_path / "audit.html")
    html = (tmp_path / "audit.html").read_text()
    assert "null: data points, pursuit" in html and "there are no texts to show" in html
    assert not browsers(tmp_path / "audit.html")
    with pytest.raises(ValueError, match="page is .* a folder"):
        audit(topk(), x[:500], x[500:], page=tmp_path)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs of Weights & Biases go; it reads the environment once in a process, unless it is ended."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    yield tmp_path / "wandb"
    wandb.teardown()


@pytest.mark.slow
def test_weights_and_biases(stock: Path, text: Path, tmp_path: Path, offline: Path) -> None:
    """Offline: the table and the page are among the files of the run, the numbers in its log."""
    options = ["--text", str(text), "--tokens", "1000", "--loss-tokens", "0", "--device", "cpu"]
    assert main(["audit", str(stock), *options, "--wandb", "mine", "--page", str(tmp_path / "audit.html")]) == 0
    wandb.teardown()  # its service writes the log when it ends, at the latest
    (run,) = offline.glob("offline-run-*")
    (html,) = run.rglob("*.html")
    assert "atoms-0" in html.read_text()
    (table,) = run.rglob("*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"][:3] == ["held-out", "R²", "R² (AIP)"] and found["data"][0][0] == "its own encoder"
    (log,) = run.glob("*.wandb")
    assert b"r2_aip" in log.read_bytes()
