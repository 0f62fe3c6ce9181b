"""Dashboards of every latent for Neuronpedia, in the file format of sae-dashboard's runner."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.positions import tokenised
from atom_lens.errors import AtomLensError
from atom_lens.evidence.codes import active_rows, codes_of
from atom_lens.recipe.contexts import Corpus
from atom_lens.storage.files import new_folder, write_json
from atom_lens.studies.audit.reading import Read
from atom_lens.studies.report.browsers import lens_for
from atom_lens.studies.report.words import Lens

_BATCH = 128  # latents per file
_TOP, _INTERVALS, _EACH = 20, 5, 4  # contexts: the strongest, and a few from each interval below the largest
_BARS = 40
_WORDS = 10
# Other keys of sae-dashboard's files, which readers expect.
_NOT_MEASURED = [
    f"{what}_{of}"
    for what, of in [
        *(("neuron_alignment", of) for of in ("indices", "values", "l1")),
        *((f"correlated_{what}", of) for what in ("neurons", "features") for of in ("indices", "l1", "pearson")),
        ("decoder_weights", "dist"),
    ]
] + ["vector"]


def write_dashboards(folder: Path, opened: Mapping[str, Any], read: Read, hook: str, model: str) -> None:
    """Write a folder of ``batch-0.json``, ``batch-1.json``, ... for each dictionary, all of them or nothing.

    Args:
        folder: must be empty or not exist.
        opened: the dictionaries by name, which becomes the name of the source set.
        read: text of both sides, and the model that read it.
        hook: where the dictionaries act.
        model: the name of the model.

    Raises:
        FileExistsError: the folder has something in it.
    """
    assert read.corpus is not None
    lens = lens_for([hook], lambda: read.model)
    contexts = _Contexts(read.corpus, wrap_backend(read.model).tokenizer)
    with new_folder(folder) as temporary:
        for name, one in opened.items():
            within = temporary / re.sub(r"[^\w.-]+", "-", name).strip("-.")
            within.mkdir()
            codes = codes_of(one, read.corpus.x)
            directions = one.W_dec.detach().cpu().float()
            about = {"model_id": model, "layer": layer_of(hook), "sae_set": within.name, "sae_id_suffix": None}
            for number, part in enumerate(torch.arange(len(directions)).split(_BATCH)):
                latents = [
                    {
                        "feature_index": latent,
                        **words,
                        **contexts.fired(codes, latent),
                        **{key: [] for key in _NOT_MEASURED},
                        "dataset": read.text,
                    }
                    for latent, words in zip(part.tolist(), _words(directions[part], lens), strict=True)
                ]
                write_json(within / f"batch-{number}.json", {**about, "features": latents}, indent=None)


def layer_of(hook: str | None) -> int:
    """The layer of a hook.

    Raises:
        AtomLensError: it is in none.
    """
    found = re.match(r"blocks\.(\d+)\.", hook or "")
    if found is None:
        raise AtomLensError(f"hook is {hook!r}, dashboards for Neuronpedia need text, and a hook of a layer")
    return int(found[1])


class _Contexts:
    """The tokens of each context, and the place of each row among them."""

    def __init__(self, corpus: Corpus, tokenizer: Any) -> None:
        self.prompt, starts, _ = corpus.places.numpy().T
        texts = [prompt.text for prompt in corpus.prompts]
        spans = [characters for _, characters in tokenised(tokenizer, texts, prepend_bos=False)]
        self.tokens = [[text[a:b] for a, b in one] for text, one in zip(texts, spans, strict=True)]
        begins = [{start: at for at, (start, end) in enumerate(one) if end > start} for one in spans]
        self.at = np.array([begins[prompt][start] for prompt, start in zip(self.prompt, starts, strict=True)])

    def fired(self, codes: csc_array, latent: int) -> dict[str, Any]:
        """How often a latent fires, how strongly, and where."""
        rows, values = active_rows(codes, latent)
        return {
            "frac_nonzero": len(rows) / len(self.prompt),
            **_bars("freq_hist_data", np.abs(values)),
            "n_prompts_total": len(self.tokens),
            "n_tokens_in_prompt": max(map(len, self.tokens)),
            "activations": list(self._shown(rows, values)) if len(rows) else [],
        }

    def _shown(self, rows: np.ndarray, values: np.ndarray) -> Iterator[dict[str, Any]]:
        """The contexts with the largest coefficients, and some from each interval of magnitudes.

        `values` are sorted by magnitude, largest first.
        """
        sizes, prompts = np.abs(values), self.prompt[rows]
        first = np.sort(np.unique(prompts, return_index=True)[1])  # the largest coefficient of each context
        groups = [(-1.0, 99.0, -1.0, first[:_TOP])]  # how sae-dashboard marks the strongest
        edges = np.linspace(0, sizes[0], _INTERVALS + 1)
        for low, high in reversed(list(pairwise(edges))):
            inside = (sizes > low) & (sizes <= high)
            groups.append((low, high, inside.mean(), first[inside[first]][:_EACH]))
        for low, high, share, chosen in groups:
            for one in chosen:
                here = prompts == prompts[one]
                coefficients = np.zeros(len(self.tokens[prompts[one]]))
                coefficients[self.at[rows[here]]] = values[here]
                yield {
                    "bin_min": float(low),
                    "bin_max": float(high),
                    "bin_contains": float(share),
                    "tokens": self.tokens[prompts[one]],
                    "values": coefficients.round(3).tolist(),
                    "qualifying_token_index": int(self.at[rows[one]]),
                }


def _words(directions: Float[Tensor, "B d"], lens: Lens | str | None) -> list[dict[str, Any]]:
    """The words that latents promote and suppress, and a histogram of all logits; empty without a lens."""
    if not isinstance(lens, Lens):
        none = {f"{end}_{what}": [] for end in ("neg", "pos") for what in ("str", "values")}
        return [{**none, **_bars("logits_hist_data", [])}] * len(directions)
    logits = directions @ lens.weights
    ends = {"pos": logits.topk(_WORDS, dim=1), "neg": logits.topk(_WORDS, dim=1, largest=False)}
    found = [_bars("logits_hist_data", row) for row in logits.numpy()]
    for end, best in ends.items():
        for latent, values, ids in zip(found, best.values.tolist(), best.indices, strict=True):
            latent[f"{end}_str"] = lens.tokenizer.batch_decode(ids[:, None].tolist())
            latent[f"{end}_values"] = [round(value, 3) for value in values]
    return found


def _bars(name: str, values: Any) -> dict[str, Any]:
    """A histogram: the middles of its bars, and the number of values in each."""
    heights, edges = np.histogram(values, _BARS) if len(values) else (np.zeros(0), np.zeros(1))
    middles = (edges[1:] + edges[:-1]) / 2
    return {f"{name}_bar_values": middles.round(4).tolist(), f"{name}_bar_heights": heights.astype(float).tolist()}
