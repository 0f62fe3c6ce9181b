"""Running text: documents stay on their side, a model reads them while atoms are trained, and a stop changes no bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS
from datasets import load_from_disk
from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig
from transformers import AutoTokenizer

from atom_lens import harvest, load_atoms, open_model, train
from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.documents import all_prefixes, contexts
from atom_lens.activations.models import find_model, load_tokenizer
from atom_lens.activations.positions import prefixes
from atom_lens.activations.prompts.files import JsonLines, TextFile
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.stream import Stream
from atom_lens.cli import main
from atom_lens.interventions.loss import spliced_losses
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import check_recipe
from atom_lens.recipe.running import beginnings, document_side, model_of, stream_of
from atom_lens.recipe.split import harvest_for, prompts_of, split_activations
from atom_lens.training.checkpoint import Checkpoints
from atom_lens.training.mixing import Mixing

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"


class Stopped(Exception):
    """Somebody pressed Ctrl-C."""


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Documents of 1 to 60 random letters, in two files of JSON lines."""
    draw = random.Random(0)
    made = [" ".join(draw.choices(LETTERS[64:90], k=draw.randint(1, 60))) for _ in range(150)]
    for number, part in enumerate((made[:100], made[100:])):
        (tmp_path / f"text-{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    return made


@pytest.fixture
def streamed(recipe: dict[str, Any], texts: list[str], tmp_path: Path) -> dict[str, Any]:
    return {
        **recipe,
        "prompts": {"source": "jsonl", "path": str(tmp_path / "text-*.jsonl")},
        "hooks": [HOOK, OTHER],
        "positions": "all",
        "split": {"heldout": 0.2, "validation": 0.1},
        "stream": {"context_size": 16, "metric_tokens": 600, "heldout_tokens": 200, "buffer_size": 256},
        "atoms": {"architecture": "aip_pursuit", "capacity": 32, "target_l0": 2.0},
        "training": {"steps": 60, "batch_size": 32, "device": "cpu", "seeds": 2},
    }


@pytest.fixture
def tokens(tiny: str, texts: list[str], tmp_path: Path) -> Path:
    """The same documents as sae-lens tokenises and packs them: a data set of contexts, which cross documents."""
    folder = tmp_path / "tokens"
    config = PretokenizeRunnerConfig(
        tokenizer_name=tiny,
        dataset_path="json",
        data_files=[str(tmp_path / f"text-{number}.jsonl") for number in (0, 1)],
        num_proc=1,
        context_size=12,
        save_path=str(folder),
    )
    PretokenizeRunner(config).run()
    return folder


def test_tokens_of_sae_lens_are_read(streamed: dict[str, Any], tokens: Path, tiny: str, tmp_path: Path) -> None:
    prompts = {"source": "dataset", "path": str(tokens), "columns": {"tokens": "input_ids"}, "tokenizer": tiny}
    recipe = check_recipe({**streamed, "prompts": prompts})
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = load_from_disk(str(tokens))["input_ids"]
    written = [token for row in rows for token in row.tolist() if token != tokenizer.bos_token_id]
    read = [
        token
        for context, _ in contexts(recipe.source("stream").documents(), tokenizer, 12, True)
        for token in tokenizer(context.text, add_special_tokens=False)["input_ids"]
    ]
    assert read == written and len(read) > 3000
    assert load_atoms(train(recipe, out=tmp_path), hook=HOOK).cfg.d_sae == 32
    with pytest.raises(ValueError, match="columns has tokens but tokenizer is null, the tokenizer that made them"):
        prompts_of(check_recipe({**streamed, "prompts": {**prompts, "tokenizer": None}}))
    with pytest.raises(ValueError, match=r"row 1: neither a text, nor tokens, nor a template .*, but \['input_ids'\]"):
        prompts_of(check_recipe({**streamed, "prompts": {**prompts, "columns": {}}}))
    path = tmp_path / "words.jsonl"
    path.write_text(f'{{"tokens": [{tokenizer.bos_token_id}]}}\n')
    assert JsonLines(path=str(path), tokenizer=tiny).read() == []
    with pytest.raises(ValueError, match="line 1: tokens is a, allowed are whole numbers"):
        path.write_text('{"tokens": "a"}')
        prompts_of(check_recipe({**streamed, "prompts": {"source": "jsonl", "path": str(path), "tokenizer": tiny}}))


def test_contexts_are_the_document_in_pieces(tiny: str, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    found = list(contexts(map(Prompt, texts), tokenizer, 16, True))
    for text in texts:
        own = [(piece.text, tokens) for piece, tokens in found if piece.group == text]
        assert " ".join(piece for piece, _ in own) == text
        assert [tokens for _, tokens in own[:-1]] == [15] * (len(own) - 1), "all but the last are full"
        for piece, tokens in own:
            assert len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == tokens <= 15


def test_documents_keep_their_side(streamed: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    """However many there are, and in any order; every copy of one is on the side of the others."""
    made = check_recipe(streamed)
    side = {text: document_side(made.split, text) for text in texts}
    counts = {name: list(side.values()).count(name) for name in ("train", "validation", "heldout")}
    assert 90 <= counts["train"] <= 125 and 15 <= counts["heldout"] <= 45 and 3 <= counts["validation"] <= 25
    other = check_recipe({**streamed, "split": {"heldout": 0.2, "validation": 0.1, "seed": 1}})
    assert any(document_side(other.split, text) != side[text] for text in texts)
    kept = beginnings(made)
    read = {name: sum(len(p.text.split()) for p in kept if side[p.group] == name) for name in counts}
    assert 600 <= read["train"] < 600 + 16 and 200 <= read["heldout"] < 200 + 16


def test_what_is_kept_is_split_by_document(streamed: dict[str, Any]) -> None:
    made = check_recipe(streamed)
    prompts = prompts_of(made)
    split = split_activations(made, prompts, harvest_for(made, prompts), HOOK)
    assert split.validation is not None
    assert {document_side(made.split, prompts[i].group) for i in split.prompts} == {"train"}
    assert {document_side(made.split, subject) for subject in split.subjects} == {"heldout"}
    # A beginning that documents share is read once, so a few rows are missing on the last side that has it.
    assert 500 < len(split.x) <= 616 and 150 < len(split.heldout) <= 216 and 50 < len(split.validation) <= 216
    seen = corpus(made, HOOK)
    assert len(seen) == len(split.x) + len(split.heldout), "nothing is read on validation rows"
    torch.testing.assert_close(seen.x.select(seen.heldout)[:], split.heldout[:], rtol=0, atol=0)


def test_a_stream_is_the_harvest_of_its_documents(streamed: dict[str, Any], tiny: str, texts: list[str]) -> None:
    """Pass after pass, in order, at every hook; without any beginning that a held-out or validation context has."""
    made = check_recipe(streamed)
    prompts = prompts_of(made)
    stored = harvest_for(made, prompts)
    stream = stream_of(made, prompts, stored, model_of(made))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    own = [
        p for p, _ in contexts(map(Prompt, texts), tokenizer, 16, True) if document_side(made.split, p.group) == "train"
    ]
    training = [i for i, prompt in enumerate(prompts) if document_side(made.split, prompt.group) == "train"]
    aside = [prompt for i, prompt in enumerate(prompts) if i not in training]
    assert [prompts[i].text for i in training] == [prompt.text for prompt in own[: len(training)]]
    shut = all_prefixes(aside, tokenizer, True)
    rest = own[len(training) :]
    whole = harvest(tiny, rest, [HOOK, OTHER], "all", device="cpu", massive_ratio=None)
    opened = []
    for prompt, token in whole.rows[HOOK].tolist():
        ids = [tokenizer.bos_token_id, *tokenizer(rest[prompt].text, add_special_tokens=False)["input_ids"]]
        opened.append(list(prefixes(ids))[token] not in shut)
    assert 0 < opened.count(False) < len(opened) / 4
    known = torch.isin(stored.rows[HOOK][:, 0], torch.tensor(training))
    expected = {hook: torch.cat([stored[hook][known], whole[hook][torch.tensor(opened)]]) for hook in whole}
    parts: dict[str, list[torch.Tensor]] = {HOOK: [], OTHER: []}
    while stream.passes < 2:
        for hook, x in stream.read(100).items():
            parts[hook].append(x)
    n = len(expected[HOOK])
    for hook, x in parts.items():
        for start in (0, n):
            torch.testing.assert_close(torch.cat(x)[start : start + n], expected[hook], rtol=1e-4, atol=1e-5)


def test_no_model_reads_what_is_stored(streamed: dict[str, Any]) -> None:
    """Neither again in later passes, nor at all where the documents end before metric_tokens."""
    made = check_recipe({**streamed, "stream": {**streamed["stream"], "metric_tokens": 10_000}})
    prompts = prompts_of(made)
    stored = harvest_for(made, prompts)
    stream = stream_of(made, prompts, stored, model_of(made))
    split = split_activations(made, prompts, stored, HOOK)
    stream.opened = lambda: pytest.fail("a model was opened")
    rows = [stream.read(100)[HOOK] for _ in range(120)]
    torch.testing.assert_close(torch.cat(rows)[: len(split.x)], split.x[:], rtol=0, atol=0)
    assert stream.passes > 1 and {len(x) for x in rows} == {100, len(split.x) % 100}


def test_stored_rows_are_those_that_no_hook_drops(streamed: dict[str, Any]) -> None:
    made = check_recipe({**streamed, "massive_ratio": 1.2})
    prompts = prompts_of(made)
    stored = harvest_for(made, prompts)
    assert min(stored.dropped.values()) > 0
    stream = stream_of(made, prompts, stored, model_of(made))
    places = [set(map(tuple, stored.rows[hook].tolist())) for hook in (HOOK, OTHER)]
    training = {i for i, prompt in enumerate(prompts) if document_side(made.split, prompt.group) == "train"}
    shared = [place for place in sorted(places[0] & places[1]) if place[0] in training]
    for hook in (HOOK, OTHER):
        at = {tuple(place): row for row, place in enumerate(stored.rows[hook].tolist())}
        expected = stored[hook][torch.tensor([at[place] for place in shared])]
        assert torch.equal(stream.known[hook][:], expected)


def test_a_state_goes_on_with_the_same_batches(streamed: dict[str, Any]) -> None:
    made = check_recipe(streamed)
    prompts = prompts_of(made)
    found = harvest_for(made, prompts)

    def mixing() -> Mixing:
        return Mixing(stream_of(made, prompts, found, model_of(made)), 32, 128, 0, {"empty": HOOK})

    first = mixing()
    for _ in range(40):
        batch = next(first)
    assert set(batch) == {HOOK, OTHER, "empty"} and first.stream.passes == 0 and first.stream.taken > 20
    torch.testing.assert_close(batch["empty"].sort(dim=0)[0], batch[HOOK].sort(dim=0)[0], rtol=0, atol=0)
    assert not torch.equal(batch["empty"], batch[HOOK])
    state = json.loads(json.dumps(first.stream.state()))
    again = mixing()
    again.restore({**first.state(), "stream": state, "buffer": dict(first.buffer)})
    for _ in range(80):
        here, there = next(first), next(again)
        assert all(torch.equal(here[name], there[name]) for name in here)
    assert first.stream.passes > 0, "over the end of the documents as well"


def test_batches_are_mixed(streamed: dict[str, Any]) -> None:
    """Rows of a batch come from all over the buffer, and every row is handed out once."""
    made = check_recipe({**streamed, "hooks": [HOOK]})
    prompts = prompts_of(made)
    mixing = Mixing(stream_of(made, prompts, harvest_for(made, prompts), model_of(made)), 32, 256, 0)
    order: dict[bytes, int] = {}
    read = mixing.stream.read

    def watched(n: int) -> dict[str, torch.Tensor]:
        found = read(n)
        for row in found[HOOK]:
            order.setdefault(row.numpy().tobytes(), len(order))
        return found

    mixing.stream.read = watched
    places = [[order[row.numpy().tobytes()] for row in next(mixing)[HOOK]] for _ in range(20)]
    assert all(max(batch) - min(batch) > 128 for batch in places)
    drawn = list(chain.from_iterable(places))
    assert drawn != sorted(drawn)
    assert len(set(drawn)) > 0.9 * 640  # but for beginnings that several documents have


def test_no_row_is_read_that_is_not_asked_for(streamed: dict[str, Any]) -> None:
    made = check_recipe({**streamed, "hooks": [HOOK]})
    prompts = prompts_of(made)
    mixing = Mixing(stream_of(made, prompts, harvest_for(made, prompts), model_of(made)), 32, 256, 0, rows=20 * 32)
    read, sizes = mixing.stream.read, []

    def watched(n: int) -> dict[str, torch.Tensor]:
        found = read(n)
        sizes.append(len(found[HOOK]))
        return found

    mixing.stream.read = watched
    for _ in range(20):
        assert len(next(mixing)[HOOK]) == 32
    assert 640 <= sum(sizes) < 640 + 16, "a context more at most"
    assert len(next(mixing)[HOOK]) == 32, "one more than was announced"


@pytest.mark.slow
def test_train_on_a_stream(streamed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hooks in one pass; it stops and goes on to the same bits; evaluate, with no other word, finds the same."""
    reads = []
    real = Stream.read
    monkeypatch.setattr(Stream, "read", lambda self, n: reads.append(n) or real(self, n))
    whole = train(check_recipe(streamed), out=tmp_path / "whole")
    once = len(reads)
    assert 5 < once < 40, "both hooks from the same passes"
    atoms = load_atoms(whole, hook=HOOK)
    assert atoms.cfg.d_sae == 32 and (whole / OTHER / "seed-1").is_dir()
    report = json.loads((whole / HOOK / "report.json").read_text())
    assert report["identity"]["pw_mcc"] > 0 and set(report["nulls"]) >= {"shuffled"}

    steps = {"training": {**streamed["training"], "checkpoint_minutes": 0}}
    calls = 0
    keep = Checkpoints.keep

    def stopping(self: Checkpoints) -> None:
        nonlocal calls
        keep(self)
        calls += 1
        if calls in (20, 45):
            raise Stopped

    monkeypatch.setattr(Checkpoints, "keep", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(check_recipe({**streamed, **steps}), out=tmp_path / "stopped")
    resumed = train(check_recipe({**streamed, **steps}), out=tmp_path / "stopped")
    for file in whole.rglob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.relative_to(whole)).read_bytes(), file.name


@pytest.mark.slow
def test_other_studies_read_the_beginnings(
    run: Callable[..., tuple[int, str, str]],
    streamed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are measured on what is kept, and train on it."""
    assert run("--quiet", **streamed)[0] == 0
    told = json.loads((tmp_path / "runs" / "tiny" / HOOK / "report.json").read_text())
    assert main(["evaluate", "runs/tiny", "--hook", HOOK, "--json", "again.json"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["heldout"]["r2"] == pytest.approx(told["heldout"]["r2"], rel=1e-5)
    assert main(["evaluate", "runs/tiny", "split.seed=1", "--hook", HOOK]) == 2, "other documents are held out"
    assert "are subjects that these atoms were trained on" in capsys.readouterr().err
    mine = {"name": "mine", "path": f"runs/tiny/{HOOK}"}
    compared = {"kinds": ["aip_topk", "topk"], "l0": [2.0], "matched": [2.0], "features": [mine], "loss_tokens": 100}
    code, out, err = run("name=compared", command="compare", **streamed, compare=compared)
    assert code == 0, err
    assert "CE recovered" in out
    found = json.loads((tmp_path / "runs" / "compared" / "compare.json").read_text())["hooks"][HOOK]
    cells = {cell["kind"]: cell for cell in found["cells"]}
    assert cells.keys() >= {"aip_topk", "topk", "null_data", "mine"}
    assert all(one["loss"] for cell in cells.values() for one in cell["runs"])
    assert any(row["recovered"] is not None for row in found["matched"])
    # The same from the first held-out contexts, found by the side of their documents alone.
    read = check_recipe(streamed)
    held = [one for one in beginnings(read) if document_side(read.split, one.group) == "heldout"]
    ends = list(accumulate(len(one.text.split()) for one in held))
    held = held[: sum(end < 100 for end in ends) + 1]
    atoms = load_atoms("runs/tiny", hook=HOOK)
    expected = spliced_losses(open_model(read.model.name, device="cpu"), held, HOOK, {"mine": atoms})["mine"]
    (loss,) = (one["loss"] for one in cells["mine"]["runs"])
    assert loss["n"] == expected.n >= 90 and loss["recovered"] == pytest.approx(expected.recovered, rel=1e-5)
    code, _, err = run(command="compare", compare=compared | {"features": []})
    assert code == 2 and "compare.loss_tokens is 100 and positions 'subject_last'" in err
    grid = {"capacities": [16, 32], "n": [300, 500], "levels": [0.5], "loss_tokens": 100}
    code, out, err = run("name=grid", command="scale", **streamed, scale=grid)
    assert code == 0, err
    assert out.count("cross-entropy recovered") == 2, "a table for each hook"
    rows = json.loads((tmp_path / "runs" / "grid" / "scale.json").read_text())["hooks"][HOOK]["cells"]
    for cell in rows:
        losses = [one["loss"] for one in cell["runs"]]
        assert all(losses) if cell["data"] == "activations" else not any(losses)
    assert losses[0] is None and rows[0]["runs"][0]["loss"]["clean"] == pytest.approx(expected.clean, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "last"}, "key positions is 'last', allowed is 'all' in a recipe with stream"),
        ({"stream": {"context_size": 1}}, "key stream.context_size is 1, allowed is greater than or equal to 2"),
        ({"stream": {"tokens": 5}}, "key stream.tokens is unknown"),
        ({"prompts": {"source": "jsonl", "path": "nowhere-*.jsonl"}}, "file 'nowhere-*.jsonl' does not exist"),
        ({"split": {"heldout": 1e-9}}, "no document is on the side heldout"),
    ],
)
def test_what_is_wrong_is_said(
    run: Callable[..., tuple[int, str, str]],
    streamed: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    code, _, err = run(**{**streamed, **change})
    assert code == 2 and message in err and not (tmp_path / "runs" / "tiny").exists()


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    """A line that is wrong is not reached before those above it are used; lines end as they do in `read`."""
    (tmp_path / "a.txt").write_bytes("eins\r\n\r\nzwei\u2028drei\rvier".encode())
    assert [one.text for one in TextFile(path=str(tmp_path / "a.txt")).documents()] == [
        "eins",
        "zwei\u2028drei",
        "vier",
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    found = JsonLines(path=str(tmp_path / "b.jsonl")).documents()
    assert next(found).text == "good"
    with pytest.raises(ValueError, match="b.jsonl line 2: text is 1, allowed is text"):
        next(found)
    (tmp_path / "c.txt").write_bytes(b"first\n\xff\n")
    with pytest.raises(ValueError, match="not text in UTF-8 at byte 6, in line 2"):
        list(TextFile(path=str(tmp_path / "c.txt")).documents())


def test_a_stream_without_documents_says_so(tiny: str) -> None:
    source = find_model(tiny)
    tokenizer = load_tokenizer(source)

    def stream(documents: list[Prompt], without: set[int]) -> Stream:
        def backend() -> Backend:
            return open_backend(source, "auto", torch.float32, "cpu")

        return Stream(backend, lambda: documents, tokenizer, {HOOK: 1e9}, 16, True, without)

    with pytest.raises(ValueError, match="no training documents that can be read"):
        stream([], set()).read(10)
    with pytest.raises(ValueError, match="no training documents that can be read"):
        stream([Prompt("a b")], all_prefixes([Prompt("a b")], tokenizer, True)).read(10)
