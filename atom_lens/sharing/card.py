"""The model card: what a reader on the Hub should know, from the reports and the recipe of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from atom_lens._version import __version__
from atom_lens.activations.prompts.files import HubDataset
from atom_lens.evidence.results import Report
from atom_lens.recipe.recipe import Recipe
from atom_lens.storage.files import visible
from atom_lens.studies.train.show import report_table

FIGURE = "evidence.png"
_BEGIN, _END = "<!-- written by atom-lens -->", "<!-- end of what atom-lens wrote -->"
_TAGS = ["saelens", "atom-lens", "sparse-autoencoder", "mechanistic-interpretability"]
_CITATION = """```bibtex
@misc{atoms2025,
  title = {Towards Atoms of Large Language Models},
  year = {2025},
  eprint = {2509.20784},
  archivePrefix = {arXiv}
}
```"""


def run_card(
    reports: Mapping[str, Report], repo_id: str, recipe: Recipe | None = None, license: str | None = None
) -> str:
    """The README.md of a run: metadata, how to load, and every hook's table and figure with held-out data and nulls.

    Args:
        reports: hook -> report.json; each has a figure in the same folder of the repository.
        repo_id: where the atoms are published.
        recipe: of the run, which names its data.
        license: of the atoms, as the Hub abbreviates it; None leaves it out.
    """
    first = next(iter(reports.values()), None)
    base = first.model if first else None
    prompts = recipe.prompts if recipe else None
    data = ModelCardData(
        library_name="saelens",
        tags=_TAGS,
        # The Hub cannot link to a local folder, a GGUF file or the demo model.
        base_model=base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
        datasets=[prompts.path] if isinstance(prompts, HubDataset) else None,
        license=license,
    )
    hooks = list(reports)
    example = hooks[0] if hooks else "blocks.9.hook_resid_post"
    parts = [
        f"# {repo_id.split('/')[1]}",
        f"Atoms of {_code(str(base))}: threshold sparse autoencoders in the atomic inner product "
        "([arXiv 2509.20784](https://arxiv.org/abs/2509.20784)), made with atom-lens "
        f"{__version__}. Numbers are given for training data, for held-out data, and for nulls.",
        "```python\n"
        "from sae_lens import SAE  # alone\n"
        f'sae = SAE.from_pretrained("{repo_id}", "{example}")\n\n'
        "from atom_lens import load_atoms  # checked against the manifest, with the metric as atoms.aip\n"
        f'atoms = load_atoms("{repo_id}", hook="{example}")\n'
        "```",
    ]
    for hook, report in reports.items():
        parts += [
            f"## {hook}",
            f"{report.d_sae} atoms of width {report.d_in}, read at {_code(str(report.positions))}.",
            f"```\n{report_table(report).text()}\n```",
            f"![angles between activations, and R² against q* of atoms and nulls]({hook}/{FIGURE})",
        ]
    if prompts is not None:
        asked = ", ".join(f"{key}={value!r}" for key, value in prompts.model_dump().items() if value)
        parts += ["## Data", f"Prompts: {_code(asked)}. The recipe is `recipe.yaml`."]
    parts += ["## Citation", _CITATION]
    body = "\n\n".join(parts)
    return f"---\n{data.to_yaml()}\n---\n\n{_BEGIN}\n{body}\n{_END}\n"


def _code(text: str) -> str:
    """A code span on one line, in which nothing is read as Markdown or HTML."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {visible(text)} {fence}" if "`" in text else f"{fence}{visible(text)}{fence}"


def merged_card(card: str, old: str | None) -> str:
    """`card` merged into the card `old`, whose other text and metadata stay as they are."""
    if old is None:
        return card
    new, before = ModelCard(card, ignore_metadata_errors=True), ModelCard(old, ignore_metadata_errors=True)
    metadata = {**before.data.to_dict(), **{k: v for k, v in new.data.to_dict().items() if v is not None}}
    metadata["tags"] = list(dict.fromkeys([*(before.data.get("tags") or []), *_TAGS]))
    ours = new.text.strip()
    pattern = re.compile(re.escape(_BEGIN) + ".*" + re.escape(_END), flags=re.DOTALL)
    text = (
        pattern.sub(lambda _: ours, before.text) if pattern.search(before.text) else f"{before.text.strip()}\n\n{ours}"
    )
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text.strip()}\n"
