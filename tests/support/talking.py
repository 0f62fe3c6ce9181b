"""A tiny model that was taught answers, and a recipe about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def talking(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, made to answer in whole words."""
    folder = tmp_path_factory.mktemp("talking")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    pieces = [i for word, i in tokenizer.get_vocab().items() if not word.isalpha()]
    with torch.no_grad():
        model.lm_head.weight[pieces] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def study(model_folder: str, folder: Path) -> Path:
    """A recipe whose answers are what the model says, so that it knows every fact."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    rows = []
    for subject in (f"{first} {second}" for first in words[:24] for second in words[-16:]):
        ids = tokenizer(f"the city of {subject} is", add_special_tokens=False).input_ids
        with torch.no_grad():
            said = tokenizer.decode(model(torch.tensor([[1, *ids]])).logits[0, -1].argmax()).strip()
        rows.append({"template": "the city of {} is", "subject": subject, "answer": said})
    (folder / "facts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "texts.txt").write_text("\n".join(f"the capital of {word} is in Italy" for word in words[:10]))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: causal
model: {{name: {json.dumps(model_folder)}}}
prompts: {{source: jsonl, path: {json.dumps(str(folder / "facts.jsonl"))}}}
other_text: {{source: text, path: {json.dumps(str(folder / "texts.txt"))}}}
hooks: [blocks.0.hook_resid_post, blocks.1.hook_resid_post]
massive_ratio: null
atoms: {{capacity: 32, target_l0: 4}}
training: {{steps: 60, batch_size: 64}}
intervene:
  kinds: [tsae_tied, topk]
  l0: [4]
  facts: 30
  scan: 20
  ks: [1, 2]
  doses: [0.5, 1]
  installed_k: 2
  other_templates: ["the capital of {{}} is"]
"""
    )
    return recipe
