"""Write the artifacts of the present format: run once per format version, from the root, and kept for ever.

python tests/artifacts/write.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import save_tiny_model

from atom_lens import load_atoms, train
from atom_lens.recipe.reading import check_recipe
from atom_lens.storage.sealed import FORMAT

HOOK = "blocks.1.hook_resid_post"

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent / f"format-{FORMAT}"
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # so that no path of this machine is in the files
        save_tiny_model(Path("tiny"))
        Path("prompts.txt").write_text("\n".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"))
        recipe = {
            "name": "run",
            "model": {"name": "tiny", "device": "cpu"},
            "prompts": {"source": "text", "path": "prompts.txt"},
            "hooks": [HOOK],
            "positions": "last",
            "atoms": {"capacity": 12, "target_l0": 2.0},
            "training": {"steps": 40, "batch_size": 16, "device": "cpu", "seeds": 2, "nulls": False},
        }
        run = train(check_recipe(recipe), out=folder)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for dtype in ("float32", "bfloat16", "float16"):
        atoms = load_atoms(run, dtype=dtype)
        if dtype != "float32":
            atoms.save_model(folder / dtype)
        codes = atoms.encode(x.to(atoms.dtype))
        outputs = {"x": x, "codes": codes, "x_hat": atoms.decode(codes)}
        save_file(
            {name: value.detach().contiguous() for name, value in outputs.items()}, folder / f"{dtype}.safetensors"
        )
    for file in (run / "log.txt", folder / ".run.lock"):
        file.unlink()
