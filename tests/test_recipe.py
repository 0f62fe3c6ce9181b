"""A recipe means what it says: no boolean is a number, nothing is said twice, nothing is found wrong after the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atom_lens import load_recipe
from atom_lens.recipe.yaml import read_yaml, write_yaml
from atom_lens.studies.compare.run import compare
from atom_lens.studies.intervene.run import intervene
from atom_lens.studies.planted.run import load_planted
from atom_lens.studies.train.run import train

BASE = """
name: x
model: {name: nowhere}
prompts: {source: text, path: p.txt}
hooks: [blocks.1.hook_resid_post]
"""
TRAINED = BASE + "atoms: {capacity: 8, target_l0: 2}\ntraining: {steps: 1}\n"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def go(extra: str, overrides: tuple[str, ...] = (), base: str = BASE) -> Any:
        Path("recipe.yaml").write_text(base + extra, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides)

    return go


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("training: {steps: 1, lr: true}", "key training.lr is True, allowed is a valid number"),
        ("training: {steps: 1, lr: yes}", "key training.lr is 'yes', allowed is a valid number"),
        ("training: {steps: true}", "key training.steps is True, allowed is a valid integer"),
        ("training: {steps: 010}", "key training.steps is '010', allowed is a valid integer"),
        ("training: {steps: 1:30}", "key training.steps is '1:30', allowed is a valid integer"),
        ("training: {steps: 1, nulls: off}", "key training.nulls is 'off', allowed is a valid boolean"),
        ("metric: {ridge: true}", "key metric.ridge is True"),
        ("metric: {ridge: yes}", "key metric.ridge is 'yes'"),
        ("compare: {l0: [true]}", "key compare.l0.0 is True"),
        ("massive_ratio: on", "key massive_ratio is 'on'"),
        ("max_tokens: .nan", "key max_tokens is nan"),
        ("split: {heldout: .inf}", "key split.heldout is inf"),
        ("split: {heldout: 1e400}", "key split.heldout is inf"),
        ("positions: last\npositions: all", "key 'positions' is given twice, the second time in line 7"),
        ("training: {steps: 1, steps: 2}", "key 'steps' is given twice"),
        ("compare: {l0: [3, 6, 3]}", "key compare.l0 has 3.0 twice"),
        ("compare: {kinds: [topk, topk]}", "key compare.kinds has 'topk' twice"),
        ("scale: {capacities: [8, 8], n: [4]}", "key scale.capacities has 8 twice"),
        ("training: {steps: 1, seed: -3}", "key training.seed is -3, allowed is greater than or equal to 0"),
        ("training: {steps: 1, seed: 1180591620717411303424}", "allowed is less than 2147483648"),
        ("split: {seed: 2147483648}", "key split.seed is 2147483648, allowed is less than 2147483648"),
        ("training: {steps: 1, warm_up: 0.8, decay: 0.3}", "allowed is up to 1 together"),
        ("x: [" + "[" * 5000, "nested too deep"),
        ("training: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_refused(read: Any, extra: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(extra + "\n")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hooks_twice_and_overrides_twice(read: Any) -> None:
    with pytest.raises(ValueError, match=r"key hooks has 'blocks.1.hook_resid_post' twice"):
        read("", ("hooks=[blocks.1.hook_resid_post, blocks.1.hook_resid_post]",))
    with pytest.raises(ValueError, match=r"override 'split.seed' is given twice"):
        read("", ("split.seed=1", "split.seed=2"))
    with pytest.raises(ValueError, match=r"override 'split' replaces what override 'split.seed' set"):
        read("", ("split.seed=1", "split={heldout: 0.3}"))
    found = read("", ("split={heldout: 0.3}", "split.seed=1"))
    assert (found.split.heldout, found.split.seed) == (0.3, 1)


def test_seeds_at_the_edges(read: Any) -> None:
    """The largest seed serves torch, numpy and what is derived from it."""
    largest = 2**31 - 1
    assert read(f"split: {{seed: {largest}}}\n").split.seed == largest
    Path("planted.yaml").write_text(f"name: x\nseed: {largest}\n")
    assert load_planted("planted.yaml").seed == largest
    with pytest.raises(ValueError, match="key seed is -1"):
        load_planted("planted.yaml", ["seed=-1"])


def test_what_yaml_1_1_misreads(read: Any) -> None:
    """Norway's code is a name, and a number is a number as people write it."""
    found = read("", ("name=no", "prompts.path=2026-11-26", "metric.ridge=1e-3", "split.heldout=.5"))
    assert (found.name, found.prompts.path, found.metric.ridge, found.split.heldout) == ("no", "2026-11-26", 1e-3, 0.5)
    assert read_yaml("a: &x {q: 1}\nb: {<<: *x, q: 2}") == {"a": {"q": 1}, "b": {"q": 2}}


scalars = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    st.sampled_from(["no", "1e-3", "010", "0x1f", "1:30", "true", "~", "", ".inf", "<<", "=", "2026-01-02", "1_000"]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
)


@given(st.dictionaries(st.text("abc", min_size=1), st.one_of(scalars, st.lists(scalars))))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    """By this package and, as recipes travel, by a reader of YAML 1.1."""
    assert read_yaml(write_yaml(data)) == data == yaml.safe_load(write_yaml(data))


@pytest.mark.parametrize(("study", "name"), [(train, "train"), (compare, "compare"), (intervene, "intervene")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_devices_are_looked_for_before_any_work(read: Any, study: Any, name: str) -> None:
    """The model does not exist: whoever looked for it first would say so."""
    for section in ("model", "training"):
        with pytest.raises(ValueError, match="device 'cuda' is not"):
            study(read("", (f"{section}.device=cuda",), TRAINED))
    assert not Path("runs").exists()


def test_more_active_atoms_than_atoms(read: Any) -> None:
    for study, name in ((compare, "compare"), (intervene, "intervene")):
        with pytest.raises(ValueError, match=rf"{name}.l0 has 9, allowed is up to atoms.capacity=8"):
            study(read("", (f"{name}.l0=[2, 9]",), TRAINED))
