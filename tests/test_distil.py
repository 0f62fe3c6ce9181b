"""A pursuit distilled into one matrix: the same atoms, a plain sae-lens SAE, and what is lost with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from atom_lens import AtomicInnerProduct, PursuitSAE, faithfulness, load_atoms
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.sharing.publish import publish
from atom_lens.training.distil import distil
from atom_lens.training.fit import fit_one


def planted(n: int) -> torch.Tensor:
    """Sums of three of 32 directions in 16 dimensions, stretched and shifted."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    codes = torch.zeros(n, 32).scatter_(1, torch.rand(n, 32, generator=generator).topk(3).indices, 1.0)
    x = codes * (1 + torch.rand(n, 32, generator=generator)) @ atoms + 0.02 * torch.randn(n, 16, generator=generator)
    return x @ torch.diag(torch.logspace(0, 1, 16)) + 3


@pytest.mark.slow
def test_a_plain_sae_finds_the_same_atoms(tmp_path: Path) -> None:
    x, heldout = planted(3000).split(2600)
    asked = Atoms.model_validate({"architecture": "aip_pursuit", "capacity": 32, "target_l0": 3.0})
    training = Training(steps=400, batch_size=128, lr=3e-3, device="cpu")
    pursued, _ = fit_one(x[:2400], AtomicInnerProduct.estimate(x), asked, training, {"hook_name": "h"}, x[2400:])
    assert isinstance(pursued, PursuitSAE)
    small = distil(pursued, x, training)
    assert small.cfg.k == 3 and small.cfg.metadata.hook_name == "h"
    assert torch.equal(small.aip.metric, pursued.aip.metric)
    match = pursued.aip.cosine(small.W_dec.detach(), pursued.W_dec.detach()).diagonal()
    assert float(match.min()) > 1 - 1e-4, "atoms do not move"
    with torch.no_grad():
        codes, own = small.encode(heldout), pursued.encode(heldout)
        r2 = {name: faithfulness(heldout, one.decode(z)) for name, one, z in (("a", small, codes), ("b", pursued, own))}
        shared = ((codes != 0) & (own != 0)).sum() / (own != 0).sum()
    assert ((codes != 0).sum(1) <= 3).all()
    assert r2["b"] > r2["a"] > 0.5 and float(shared) > 0.6
    small.save_model(tmp_path)
    script = (
        f"import sys; from sae_lens import SAE; sae = SAE.load_from_disk({str(tmp_path)!r})\n"
        "assert type(sae).__name__ == 'TopKSAE' and 'atom_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.allclose(SAE.load_from_disk(tmp_path)(heldout), small(heldout), atol=1e-4)


def test_it_lies_in_the_run_and_in_its_report(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    atoms = {"architecture": "aip_pursuit", "capacity": 32, "target_l0": 2.0, "pursuit": {"distilled": True}}
    code, out, err = run(atoms=atoms)
    assert code == 0, err
    assert "distilled into TopK" in out
    folder = tmp_path / "runs" / "tiny" / "blocks.1.hook_resid_post"
    report = json.loads((folder / "report.json").read_text())["distilled"]
    assert report["k"] == 2 and report["heldout"]["l0"]["max"] <= 2 and 0 <= report["shared_atoms"] <= 1
    small = load_atoms(tmp_path / "runs" / "tiny", hook="blocks.1.hook_resid_post/distilled")
    assert small.cfg.architecture() == "aip_topk" and torch.equal(small.aip.metric, load_atoms(folder).aip.metric)
    code, out, err = run("--quiet", name="evaluated", atoms=atoms)
    assert code == 0
    listed: Any = publish(tmp_path / "runs" / "tiny", "user/name", dry_run=True)
    assert "blocks.1.hook_resid_post/distilled/cfg.json" in listed.files


def test_only_pursuits_are_distilled(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = run(atoms={"capacity": 32, "target_l0": 2.0, "pursuit": {"distilled": True}})
    assert code == 0 and "distilled" not in out
    with pytest.raises(ValueError, match="distilled"):
        load_atoms(tmp_path / "runs" / "tiny", hook="blocks.1.hook_resid_post/distilled")
