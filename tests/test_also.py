"""Other kinds in the same run: trained in the same pass, kept within the folder of the atoms, in the same table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atom_lens import load_atoms
from atom_lens.evidence.results import Report
from atom_lens.sharing.publish import publish
from atom_lens.studies.evaluate import evaluate_folder, recipe_beside

HOOK = "blocks.1.hook_resid_post"
STREAM = {"context_size": 16, "metric_tokens": 300, "heldout_tokens": 60, "buffer_size": 256}


@pytest.mark.parametrize("changes", [{}, {"positions": "all", "stream": STREAM}], ids=["prompts", "stream"])
def test_they_are_what_they_would_be_alone(
    run: Callable[..., tuple[int, str, str]], recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """They change no bit of the atoms; their rows are what `evaluate` measures, and each can be published."""
    training = {**recipe["training"], "seeds": 2}
    assert run(**changes, name="alone", training=training)[0] == 0
    code, out, _ = run(**changes, name="both", training={**training, "also": ["aip_pursuit", "aip_topk"]})
    assert code == 0 and [line.split("  ")[0] for line in out.splitlines() if "in the AIP" in line] == [
        "pursuit in the AIP (ours)",
        "TopK in the AIP (ours)",
    ]
    alone, both = (tmp_path / "runs" / name / HOOK for name in ("alone", "both"))
    for within in ("", "seed-1"):
        assert torch.equal(load_atoms(alone / within).W_dec, load_atoms(both / within).W_dec)
    report = Report.read(both / "report.json")
    assert report.train == Report.read(alone / "report.json").train and set(report.also) == {"aip_pursuit", "aip_topk"}
    for kind, one in report.also.items():
        folder = both / f"also-{kind}"
        atoms = load_atoms(folder)
        assert atoms.cfg.architecture() == kind and atoms.cfg.d_sae == 32
        measured = evaluate_folder(folder, recipe_beside(folder))
        assert measured.heldout is not None and measured.kind == kind
        for found, again in ((one.train, measured.train), (one.heldout, measured.heldout)):
            assert (found.r2, found.r2_aip, found.q_star, found.l0.mean) == pytest.approx(
                (again.r2, again.r2_aip, again.q_star, again.l0.mean), abs=1e-5
            )
    files = publish(tmp_path / "runs" / "both", "user/name", dry_run=True).files
    assert f"{HOOK}/also-aip_pursuit/sae_weights.safetensors" in files


def test_only_ours_are_allowed(run: Callable[..., tuple[int, str, str]], recipe: dict[str, Any]) -> None:
    code, _, err = run(training={**recipe["training"], "also": ["topk"]})
    assert code == 2 and "training.also.0 is 'topk', allowed is 'tsae_free', " in err
