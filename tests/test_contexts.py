"""Contexts: rows lead back to the text and token they were read from, and columns to the rows a unit is active at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from atom_lens import load_atoms
from atom_lens.evidence.codes import active_rows, codes_of
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.split import harvest_for, split_activations

HOOK = "blocks.1.hook_resid_post"


def test_rows_lead_back_to_tokens(run: Callable[..., tuple[int, str, str]], tiny: str) -> None:
    """Every token of every prompt: its characters, tokenised again in their prompt, and the split of a training."""
    assert run("positions=all", "--quiet")[0] == 0
    made = load_recipe("runs/tiny/recipe.yaml")
    found = corpus(made, HOOK)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = made.prompts.read()
    harvested = harvest_for(made, prompts)
    assert len(found) == len(found.x) == len(harvested.rows[HOOK])
    for row, (prompt, token) in enumerate(harvested.rows[HOOK].tolist()):
        assert found.prompt(row) == prompts[prompt]
        start, end = found.span(row)
        ids = [tokenizer.bos_token_id, *tokenizer(prompts[prompt].text, add_special_tokens=False)["input_ids"]]
        word = tokenizer.decode([ids[token]]).strip().removeprefix("##")
        assert word == prompts[prompt].text[start:end].strip() != ""
    split = split_activations(made, prompts, harvested, HOOK)
    torch.testing.assert_close(found.x.select(found.heldout)[:], split.heldout[:], rtol=0, atol=0)
    with pytest.raises(ValueError, match="hook is 'blocks.9', allowed are the recipe's: blocks.1"):
        corpus(made, "blocks.9")


def test_columns_are_those_of_the_dense_codes(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--quiet")[0] == 0
    found = corpus(load_recipe("runs/tiny/recipe.yaml"), HOOK)
    atoms = load_atoms("runs/tiny")
    with torch.no_grad():
        dense = atoms.encode(found.x[:]).numpy()
    codes = codes_of(atoms, found.x, batch=7)
    np.testing.assert_allclose(codes.toarray(), dense, rtol=1e-6)
    unit = int((dense != 0).sum(axis=0).argmax())
    rows, values = active_rows(codes, unit)
    assert len(rows) > 1 and set(rows) == set(np.flatnonzero(dense[:, unit]))
    np.testing.assert_array_equal(values, np.sort(codes.toarray()[rows, unit])[::-1])
