"""Publishing and loading back: a real huggingface_hub client against a server that keeps real bytes."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file
from support.hub import Hub

from atom_lens import load_atoms, publish, train
from atom_lens.activations.prompts.files import HubDataset
from atom_lens.cli import main
from atom_lens.evidence.results import Report
from atom_lens.recipe.reading import check_recipe, load_recipe
from atom_lens.sharing.card import run_card

TOKEN = "hf_" + "secret" * 6
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def run(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two hooks with two seeds."""
    folder = tmp_path_factory.mktemp("published")
    letters = "abcdefghij"
    subjects = [a + b for a in letters for b in letters][:80]
    lines = [json.dumps({"template": "{} is a city in", "subject": s}) for s in subjects]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    recipe = {
        "name": "two",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(folder / "prompts.jsonl")},
        "hooks": HOOKS,
        "atoms": {"capacity": 32, "target_l0": 2.0},
        "training": {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 2, "nulls": False},
    }
    return train(check_recipe(recipe), out=folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of our own; the client keeps its files in a folder of the test."""
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def bytes_of(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }


def test_publish_and_load_back(hub: Hub, run: Path) -> None:
    found = publish(run, "user/two", private=True)
    commit, tree = hub.tree("user/two")
    assert found.url == f"{hub.url}/user/two/commit/{commit}"
    assert len(hub.trees["user/two"]) == 2, "one commit after the empty one"
    assert hub.private["user/two"]
    figures = {f"{hook}/evidence.png" for hook in HOOKS}
    assert {name: content for name, content in tree.items() if name not in {"README.md", *figures}} == bytes_of(run)
    assert set(found.files) == set(bytes_of(run)) | figures, "the log stays at home"
    assert all(tree[name].startswith(b"\x89PNG") for name in figures)
    for hook in HOOKS:
        ours, theirs = load_atoms(run, hook=hook), load_atoms("user/two", hook=hook)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
        plain = SAE.from_pretrained("user/two", hook)
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(plain(x), SAE.load_from_disk(run / hook)(x))
    asked = [path for _, path in hub.requests if "resolve" in path]
    assert not any("seed-1" in path or "report" in path for path in asked), "only what loading needs is fetched"
    assert torch.equal(load_atoms("user/two", hook="2").W_dec, load_atoms(run, hook="blocks.2.*").W_dec)
    other = load_atoms("user/two", hook=f"{HOOKS[0]}/seed-1")
    assert torch.equal(other.W_dec, load_atoms(run / HOOKS[0] / "seed-1").W_dec)


def test_a_second_publish_sends_what_changed(hub: Hub, run: Path, tmp_path: Path) -> None:
    publish(run, "user/two")
    sent = len(hub.uploaded)
    weights = {content for name, content in bytes_of(run).items() if name.endswith(".safetensors")}
    assert len(set(hub.uploaded)) == len(weights) + len(HOOKS), "every file once, and a figure per hook"
    publish(run, "user/two")
    assert len(hub.uploaded) == sent and len(hub.trees["user/two"]) == 2, "nothing changed: no bytes, no commit"
    copy = tmp_path / "two"
    for name, content in bytes_of(run).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    atoms = load_atoms(copy, hook=HOOKS[0])
    atoms.W_dec.data *= 2
    atoms.save_model(copy / HOOKS[0])
    publish(copy, "user/two")
    assert len(hub.uploaded) == sent + 1 and len(hub.trees["user/two"]) == 3
    first = f"{2:040x}"
    old = load_atoms("user/two", hook=HOOKS[0], revision=first)
    assert torch.equal(old.W_dec * 2, load_atoms("user/two", hook=HOOKS[0]).W_dec)


def test_a_readme_is_merged(hub: Hub, run: Path) -> None:
    publish(run, "user/two")
    hub.trees["user/two"][-1]["README.md"] = (
        b"---\nlicense: mit\ntags:\n- mine\n---\n\nMy words.\n\n<!-- written by atom-lens -->\nold\n"
        b"<!-- end of what atom-lens wrote -->\n\nMore words.\n"
    )
    publish(run, "user/two")
    text = hub.tree("user/two")[1]["README.md"].decode()
    assert text.index("My words.") < text.index("held-out") < text.index("More words.") and "\nold\n" not in text
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "mit" and card.data.library_name == "saelens"
    assert f"({HOOKS[0]}/evidence.png)" in text and "eprint = {2509.20784}" in text and "source='jsonl'" in text
    assert card.data.tags[:1] == ["mine"] and "atom-lens" in card.data.tags
    hub.trees["user/two"][-1]["README.md"] = b"Only words, no metadata."
    publish(run, "user/two")
    text = hub.tree("user/two")[1]["README.md"].decode()
    assert "Only words, no metadata." in text and huggingface_hub.ModelCard(text).data.library_name == "saelens"


@pytest.mark.slow
def test_a_readme_survives_a_hub_that_stumbles(hub: Hub, run: Path) -> None:
    """At every request of a publish over somebody's README in turn: cut, or answered by an error of the server."""
    words = b"My words, which are nowhere else."
    publish(run, "user/count", hooks=["1"])
    first = len(hub.requests)
    publish(run, "user/count", hooks=["1"])
    asked = len(hub.requests) - first
    for how in ("cut_at", "fail_at"):
        for at in range(asked):
            hub.trees["user/two"] = [{}, {"README.md": words, "mine.txt": b"mine"}]
            setattr(hub, how, len(hub.requests) + at)
            with contextlib.suppress(ValueError):
                publish(run, "user/two", hooks=["1"])
            setattr(hub, how, None)
            publish(run, "user/two", hooks=["1"])
            tree = hub.tree("user/two")[1]
            assert words in tree["README.md"] and tree["mine.txt"] == b"mine", (how, at)


def test_what_changes_meanwhile_is_not_lost(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, "user/two", hooks=["1"])
    real = huggingface_hub.HfApi.create_commit

    def late(self: Any, *arguments: Any, **options: Any) -> Any:
        hub.trees["user/two"].append({**hub.tree("user/two")[1], "README.md": b"Somebody was faster."})
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="did not complete, try again"):
        patch.setattr(huggingface_hub.HfApi, "create_commit", late)
        publish(run, "user/two", hooks=["2"])
    assert hub.tree("user/two")[1]["README.md"] == b"Somebody was faster."
    publish(run, "user/two", hooks=["2"])
    assert b"Somebody was faster." in hub.tree("user/two")[1]["README.md"]


def test_seeds_that_are_no_more_are_removed(hub: Hub, run: Path, tmp_path: Path) -> None:
    publish(run, "user/two")
    hub.trees["user/two"][-1][f"{HOOKS[0]}/notes.md"] = b"mine"
    copy = tmp_path / "two"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / HOOKS[0] / "seed-1")
    publish(copy, "user/two", hooks=["1"])
    tree = hub.tree("user/two")[1]
    assert not any(name.startswith(f"{HOOKS[0]}/seed-1") for name in tree) and f"{HOOKS[0]}/notes.md" in tree
    assert f"{HOOKS[1]}/seed-1/cfg.json" in tree, "that hook was not published now"


def test_card_metadata(run: Path) -> None:
    """What the Hub links to: the base model, the data set and the license, where there is something to link to."""
    recipe = load_recipe(run / "recipe.yaml")
    report = Report.read(run / HOOKS[0] / "report.json").model_copy(update={"model": "google/gemma-2-2b"})
    hub_data = recipe.model_copy(update={"prompts": HubDataset(source="dataset", path="NeelNanda/counterfact-tracing")})
    data = huggingface_hub.ModelCard(run_card({HOOKS[0]: report}, "user/two", hub_data, "gemma")).data
    assert (data.base_model, data.datasets, data.license) == (
        "google/gemma-2-2b",
        ["NeelNanda/counterfact-tracing"],
        "gemma",
    )
    data = huggingface_hub.ModelCard(
        run_card({HOOKS[0]: report.model_copy(update={"model": "demo:gemma"})}, "user/two", recipe)
    ).data
    assert data.base_model is None and data.datasets is None and data.license is None


def test_a_damaged_run_is_not_published(hub: Hub, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "two"
    shutil.copytree(run, copy)
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (copy / HOOKS[0] / "report.json").unlink()
    (copy / HOOKS[0] / "report.json").symlink_to(secret)
    with pytest.raises(ValueError, match="report.json' has 4 bytes"):
        publish(copy, "user/two")
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json' does not exist"):
        publish(copy, "user/two")
    assert hub.requests == []


@pytest.mark.slow
def test_cut_connections(hub: Hub, run: Path) -> None:
    """A connection cut at each request in turn: the repository is whole, old or new, and a rerun completes it."""
    publish(run, "user/count", hooks=["1"])
    n_requests = len(hub.requests)
    expected = hub.tree("user/count")[1]
    for cut in range(n_requests):
        repo = f"user/cut{cut}"
        hub.cut_at = len(hub.requests) + cut
        hub.blobs.clear()
        try:
            publish(run, repo, hooks=["1"])
        except ValueError as error:
            assert "did not complete, try again" in str(error)
            assert repo not in hub.trees or hub.tree(repo)[1] == {}
        hub.cut_at = None
        publish(run, repo, hooks=["1"])
        tree = hub.tree(repo)[1]
        assert {k: v for k, v in tree.items() if k != "README.md"} == {
            k: v for k, v in expected.items() if k != "README.md"
        }


def test_dry_run_and_hooks(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["publish", str(run), "user/two", "--dry-run", "--layer", "2"]) == 0
    printed = capsys.readouterr().out
    assert "blocks.2.hook_resid_post/seed-1/aip.safetensors" in printed and "blocks.1" not in printed.split("---")[0]
    assert "library_name: saelens" in printed and "nothing was published" in printed
    assert hub.requests == []
    with caplog.at_level(logging.DEBUG):
        assert main(["publish", str(run), "user/two", "--hook", "blocks.2.*"]) == 0
    captured = capsys.readouterr()
    assert f"published: {hub.url}/user/two/commit/" in captured.out
    kept = hub.tree("user/two")[1]
    assert "blocks.1.hook_resid_post/cfg.json" not in kept
    assert f"Bearer {TOKEN}" in hub.authorization
    assert TOKEN not in captured.out + captured.err + caplog.text
    assert all(TOKEN.encode() not in content for content in kept.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "two"], "repo_id is 'two', allowed is 'user/name'"),
        (["RUN", "user/two/three"], "repo_id is 'user/two/three', allowed is 'user/name'"),
        (["nowhere", "user/two"], "no run at 'nowhere'"),
        (["HOOK", "user/two"], "it has no recipe.yaml"),
        (["RUN", "user/two", "--hook", "blocks.7.*"], "hook 'blocks.7.*' is not in"),
    ],
)
def test_bad_input(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert (
        main(["publish", *({"RUN": str(run), "HOOK": str(run / HOOKS[0])}.get(word, word) for word in arguments)]) == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and hub.requests == []


def test_loading_what_is_not_there(hub: Hub, run: Path) -> None:
    with pytest.raises(ValueError, match="'user/none' is neither a folder nor a repository that the Hub provides"):
        load_atoms("user/none")
    publish(run, "user/two")
    with pytest.raises(ValueError, match="'user/two' holds atoms of 2 hooks, choose hook= of blocks.1.hook_resid_post"):
        load_atoms("user/two")
    with pytest.raises(ValueError, match="hook 'blocks.9' is not in 'user/two', allowed are"):
        load_atoms("user/two", hook="blocks.9")
    assert load_atoms("user/two", hook="blocks.2.*").cfg.metadata.hook_name == HOOKS[1]
    with pytest.raises(ValueError, match="only a repository has revisions"):
        load_atoms(run, hook=HOOKS[0], revision="main")


def test_releases_of_sae_lens(hub: Hub, run: Path) -> None:
    """A release that sae-lens lists, from the repository it names: the same codes, no metric."""
    plain = SAE.load_from_disk(run / HOOKS[0])
    files = {f"blocks.8.hook_resid_pre/{n}": (run / HOOKS[0] / n).read_bytes() for n in ("cfg.json",)}
    files["blocks.8.hook_resid_pre/sae_weights.safetensors"] = (run / HOOKS[0] / "sae_weights.safetensors").read_bytes()
    hub.trees["jbloom/GPT2-Small-SAEs-Reformatted"] = [{}, files]
    atoms = load_atoms("gpt2-small-res-jb", hook="*.8.*")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(atoms.encode(x), plain.encode(x)) and atoms.aip.n == 0
    with pytest.raises(ValueError, match="hook 'blocks.99' is not in 'gpt2-small-res-jb', allowed are blocks.0"):
        load_atoms("gpt2-small-res-jb", hook="blocks.99")
    with pytest.raises(
        ValueError, match="'gpt2-small-res-jb' is neither a folder nor a repository that the Hub provides"
    ):
        load_atoms("gpt2-small-res-jb", hook="blocks.3.hook_resid_pre")


def test_repositories_of_others(hub: Hub, run: Path, tmp_path: Path) -> None:
    """Weights without a config, by layer, as authors leave them; only the file asked for is fetched."""
    state = SAE.load_from_disk(run / HOOKS[0]).state_dict()
    files = {"README.md": b"words"}
    for layer in (3, 12):
        renamed = {"encoder.weight": state["W_enc"].T, "encoder.bias": state["b_enc"] + layer, "W_dec": state["W_dec"]}
        renamed |= {"b_dec": state["b_dec"], "log_threshold": state["threshold"].log()}
        save_file({k: v.contiguous() for k, v in renamed.items()}, tmp_path / "w.safetensors")
        files[f"layer_{layer}/tsae_16k.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    hub.trees["someone/atoms"] = [{}, files]
    atoms = load_atoms("someone/atoms", hook="12")
    torch.testing.assert_close(atoms.threshold, state["threshold"])
    assert torch.equal(atoms.b_enc, state["b_enc"] + 12) and torch.equal(atoms.W_enc, state["W_enc"])
    assert not any("layer_3/" in path for _, path in hub.requests)
    with pytest.raises(ValueError, match="holds atoms of 2 hooks, choose hook= of layer_12/tsae_16k.safetensors"):
        load_atoms("someone/atoms")
    hub.trees["someone/words"] = [{}, {"README.md": b"words", "notes.txt": b"x"}]
    with pytest.raises(FileNotFoundError, match="no atoms at 'someone/words'"):
        load_atoms("someone/words")
    hub.trees["someone/escapes"] = [{}, {"../cfg.json": b"{}", "/cfg.json": b"{}"}]
    with pytest.raises(FileNotFoundError, match="no atoms at 'someone/escapes'"):
        load_atoms("someone/escapes")


def test_a_hub_that_refuses(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.hub import _Handler

    def refuse(self: Any) -> None:
        self.begin()
        self.answer({"error": "You don't have the rights"}, 403)

    monkeypatch.setattr(_Handler, "do_POST", refuse)
    with pytest.raises(ValueError, match=r"publishing to 'user/two' did not complete, try again: .*403") as caught:
        publish(run, "user/two")
    assert TOKEN not in str(caught.value)
