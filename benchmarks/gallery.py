"""Six dictionaries of running text, trained on the same activations, each in a folder; docs/evidence.md audits them.

    python benchmarks/gallery.py --text corpus.jsonl --out gallery
    atom-lens audit gallery/*/ --text corpus.jsonl --tokens 8192 --json gallery.json

The audit reads documents that the training held out: it finds the recipe next to the dictionaries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import atom_lens.studies  # noqa: F401 -- they register the sections of the recipe
from atom_lens import AtomicInnerProduct
from atom_lens.dictionaries import Setup, Trained, find_kind
from atom_lens.recipe.reading import dump_recipe, load_recipe
from atom_lens.recipe.split import harvest_for, prompts_of, split_activations
from atom_lens.training.fit import fit_together

KINDS = ["aip_pursuit", "tsae_free", "aip_topk", "topk_whitened", "matryoshka_batchtopk_whitened", "topk"]


def main() -> None:
    """Train them in one pass and save them."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--text", required=True, help="documents, in JSON lines")
    asked.add_argument("--out", type=Path, default=Path("gallery"))
    given = asked.parse_args()
    recipe = load_recipe(
        "text",
        [
            "name=gallery",
            "prompts.source=jsonl",
            f"prompts.path={given.text}",
            "stream.metric_tokens=250000",
            "stream.heldout_tokens=40000",
            "training.steps=2000",
        ],
    )
    atoms, training = recipe.to_train("the gallery")
    prompts = prompts_of(recipe)
    found = harvest_for(recipe, prompts)
    [hook] = found
    split = split_activations(recipe, prompts, found, hook)
    aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, source=f"{len(split.x)} training activations")
    assert recipe.stream is not None
    about = {
        "model_name": recipe.model.name,
        "hook_name": hook,
        "prepend_bos": recipe.prepend_bos,
        "context_size": recipe.stream.context_size,
    }
    setup = Setup(split.x, aip, atoms, training.device, training.steps, split.validation, about)
    kinds = {name: find_kind(name, Trained) for name in KINDS}
    learners = {name: kind.start(setup, atoms.target_l0, training.seed) for name, kind in kinds.items()}
    fit_together({"x": split.x}, learners, training)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for name, kind in kinds.items():
        made = kind.finish(learners[name], aip)
        for key, value in about.items():
            setattr(made.cfg.metadata, key, value)
        made.save_model(str(given.out / name))


if __name__ == "__main__":
    main()
