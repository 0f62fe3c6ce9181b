"""Run an audit: read text with a model, or take activations, and measure anybody's dictionaries."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.models import pick_device
from atom_lens.activations.prompts.files import HubDataset
from atom_lens.activations.prompts.source import Source
from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.encoders import Refit, bias_of, under_pursuit
from atom_lens.dictionaries.load import load_dictionary
from atom_lens.dictionaries.nulls import data_atoms, random_atoms
from atom_lens.errors import AtomLensError
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import Observation, observe
from atom_lens.evidence.results import Loss, MetricAbout
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.interventions.loss import first_texts, spliced_losses
from atom_lens.storage.files import check_new, check_writable
from atom_lens.storage.terminal import say
from atom_lens.storage.versions import versions
from atom_lens.studies.audit.log import log_audit
from atom_lens.studies.audit.neuronpedia import layer_of, write_dashboards
from atom_lens.studies.audit.page import write_page
from atom_lens.studies.audit.reading import Read, about, agreed, official, read_text_of
from atom_lens.studies.audit.result import Agreement, Audit, Audited, Measured
from atom_lens.studies.audit.show import show
from atom_lens.studies.study import Study, register
from atom_lens.tensors.rows import Rows, float32_rows, mean_row

study = register(Study(name="audit", result=Audit, show=show))
_LOSS_TOKENS = 2048
# A pursuit solves a system of the size of a code for every row and atom: beyond this it takes most of the time.
_PURSUED = 64
_WITH_LOSS = {"pursued", "data", "data_euclidean"}  # a loss takes as long as everything else
_WORK = 1 << 18  # rows times atoms of a code, for each pursuit
_CALIBRATION = 2048  # rows on which thresholds of pursuits are set, but never more than are measured


def audit(
    sae: Any,
    x_train: Float[Tensor | Rows | np.ndarray, "n d"] | None = None,
    x_heldout: Float[Tensor | Rows | np.ndarray, "m d"] | None = None,
    *,
    other: Any = None,
    model: Any = None,
    hook: str | None = None,
    text: str | Path | Source | Iterable[str] | None = None,
    tokens: int = 65_536,
    loss_tokens: int = _LOSS_TOKENS,
    device: str = "auto",
    seed: int = 0,
    json: str | Path | None = None,
    page: str | Path | None = None,
    neuronpedia: str | Path | None = None,
) -> Audit:
    """The evidence about a dictionary, on held-out activations, with nulls under the same encoder.

    Explained variance in both norms, L0 and its tail, q*, dead atoms; with a model also the cross-entropy recovered
    and the KL divergence. Each is measured under the dictionary's own encoder, with a least-squares refit on the atoms
    that it chose (without a loss), and under a threshold-activated pursuit at its mean L0; random directions and data
    points are measured under the same pursuit, and under a Euclidean one. The metric is estimated on the training side
    of the text, whatever metric the dictionary brings.

    Args:
        sae: a dictionary or the name of one (a folder, a file, "user/name", a release of sae-lens), or a list of them
            for the same hook. A dictionary has `W_dec`, `encode` and `decode`.
        x_train: activations for the metric, the thresholds and the data null, shape (n, d). With `x_heldout`, no model
            is needed.
        x_heldout: activations that everything is measured on, shape (m, d).
        other: a dictionary to compare its atoms with, of any number of atoms.
        model: a model, or the name of one; None takes the name in the dictionary's metadata.
        hook: where the dictionary acts; None takes the hook in its metadata. It also chooses among several dictionaries
            in one place.
        text: a file of text or JSON lines, a prompt source, or texts; None takes the Python language reference.
        tokens: held-out tokens to read; half as many for the metric, but at least 32 for each direction.
        loss_tokens: held-out tokens that the loss is measured on; 0 for none.
        device: where the model and the dictionaries run.
        seed: of the nulls.
        json: a file to write the result to, before page and dashboards are made.
        page: an HTML file to write: the tables, and every latent with the contexts that it fires on.
        neuronpedia: a folder to write: every latent in the files of sae-dashboard, which Neuronpedia imports.

    Raises:
        AtomLensError: no such dictionary, model, hook or text, widths that differ, too few tokens for the metric, or
            activations of one side only.
    """
    start = time.monotonic()
    saes = [one for one in (*(sae if isinstance(sae, list | tuple) else [sae]), other) if one is not None]
    if (x_train is None) != (x_heldout is None):
        missing = "x_train" if x_train is None else "x_heldout"
        raise AtomLensError(f"{missing} is None, an audit of given activations needs both x_train and x_heldout")
    if tokens < 2 or loss_tokens < 0:
        raise AtomLensError(f"tokens is {tokens} and loss_tokens {loss_tokens}, allowed are at least 2 and 0")
    for key, file in (("json", json), ("page", page)):
        if file is not None:
            check_writable(key, Path(file))
    if neuronpedia is not None:
        check_new(Path(neuronpedia))
    device = pick_device(device)
    opened = _named(saes, device, hook)
    if x_train is not None and x_heldout is not None:
        if neuronpedia is not None:
            raise AtomLensError("neuronpedia is given, it is allowed with text but not with x_train and x_heldout")
        width = next(iter(opened.values())).W_dec.shape[1]
        x, rest = (
            float32_rows(check_rows(one, name, width)) for name, one in (("x_train", x_train), ("x_heldout", x_heldout))
        )
        read, hook, name = Read(x, rest, "given activations"), None, None
    else:
        hook = agreed(opened, "hook_name", "hook", hook)
        if neuronpedia is not None:
            layer_of(hook)
        model = model if model is not None else official(str(agreed(opened, "model_name", "model", None)))
        read = read_text_of(opened, saes, model, hook, text, tokens, device)
        name = model if isinstance(model, str) else type(model).__name__
    for label, one in opened.items():
        if one.W_dec.shape[1] != read.x.shape[1]:
            raise AtomLensError(
                f"dictionary {label!r} has width {one.W_dec.shape[1]}, the activations have {read.x.shape[1]}"
            )
    aip = AtomicInnerProduct.estimate(read.x, source=f"{len(read.x)} activations of {read.text}")
    found = {label: _audited(label, one, read, aip, hook, loss_tokens, seed) for label, one in opened.items()}
    pairs = {
        (a, b): identity([_atoms(opened[a]), _atoms(opened[b])], aip, [found[a][1].alive, found[b][1].alive])
        for a, b in combinations(opened, 2)
    }
    result = Audit(
        model=name,
        hook=hook,
        text=read.text,
        n=len(read.x),
        n_heldout=len(read.heldout),
        metric=MetricAbout(n=aip.n, ridge=aip.ridge, condition=aip.condition, source=aip.source),
        dictionaries=[one for one, _ in found.values()],
        agreement=[Agreement(names=list(names), figures=one.figures) for names, one in pairs.items()],
        seconds=time.monotonic() - start,
        versions=versions(),
    )
    if json is not None:
        result.write(Path(json))
    if page is not None:
        write_page(Path(page), result, opened, {label: seen for label, (_, seen) in found.items()}, read, aip, pairs)
    if neuronpedia is not None:
        write_dashboards(Path(neuronpedia), opened, read, str(hook), str(name))
    return result


def _named(saes: Sequence[Any], device: str, hook: str | None) -> dict[str, Any]:
    """The dictionaries by unique names."""
    found: dict[str, Any] = {}
    for number, one in enumerate(saes):
        if isinstance(one, str | Path):
            name, dictionary = str(one), load_dictionary(one, device, hook=hook)
        elif isinstance(one, Dictionary) and isinstance(one.W_dec, Tensor):
            name, dictionary = type(one).__name__, one
        else:
            raise AtomLensError(f"a dictionary is of type {type(one).__name__}, expected W_dec, encode and decode")
        found[name if name not in found else f"{name} ({number + 1})"] = dictionary
    return found


def _audited(
    label: str, dictionary: Any, read: Read, aip: AtomicInnerProduct, hook: str | None, loss_tokens: int, seed: int
) -> tuple[Audited, Observation]:
    seen = observe(dictionary, read.heldout, aip)
    k, longest, why = seen.figures.l0.mean, seen.figures.l0.max, ""
    variants: dict[str, Any] = {"own": dictionary}
    if 1 <= k <= _PURSUED and longest <= 4 * _PURSUED:
        variants |= {
            "refit": Refit(dictionary, aip, bias_of(dictionary)),
            **_pursuits(dictionary, read, aip, k, seed),
        }
    else:
        why = (
            f"Refit, pursuit and nulls are left out: the mean L0 is {k:.1f} and the largest {longest}, allowed are "
            f"means from 1 to {_PURSUED} and codes up to {4 * _PURSUED}."
        )
    losses = _losses(variants, read, hook, loss_tokens, bos=about(dictionary, "prepend_bos") is not False)
    # As many rows as pursuits can encode in reasonable time.
    rows = _drawn(read.heldout, max(1024, round(_WORK / max(1.0, k))), seed)
    measured = {
        name: Measured(
            figures=seen.figures if name == "own" else observe(one, rows, aip).figures, loss=losses.get(name)
        )
        for name, one in variants.items()
    }
    return Audited(
        name=label,
        architecture=_architecture(dictionary),
        d_sae=len(dictionary.W_dec),
        train=observe(dictionary, read.x, aip).figures,
        own=measured.pop("own"),
        refit=measured.pop("refit", None),
        pursued=measured.pop("pursued", None),
        nulls=measured,
        why=why,
    ), seen


def _pursuits(dictionary: Any, read: Read, aip: AtomicInnerProduct, k: float, seed: int) -> dict[str, Dictionary]:
    """Its atoms, random directions and data points under pursuits of the same mean L0, nulls in either norm."""
    generator, x = torch.Generator().manual_seed(seed), read.x
    n_atoms, device, mean = len(dictionary.W_dec), dictionary.W_dec.device, mean_row(x).float()
    drawn = _drawn(x, min(_CALIBRATION, len(read.heldout)), seed)
    random, data = random_atoms(n_atoms, aip, generator), data_atoms(x, n_atoms, mean, generator)
    atoms = {
        "pursued": (_atoms(dictionary), bias_of(dictionary), 0.0),
        "random": (random, mean, 0.0),
        "data": (data, mean, 0.0),
        "random_euclidean": (random, mean, 1.0),
        "data_euclidean": (data, mean, 1.0),
    }
    return {
        name: under_pursuit(rows.to(device), bias.to(device), aip, drawn, k, norm)
        for name, (rows, bias, norm) in atoms.items()
    }


def _architecture(dictionary: Any) -> str:
    return dictionary.cfg.architecture() if isinstance(dictionary, SAE) else type(dictionary).__name__


def _drawn(x: Rows, most: int, seed: int) -> Rows:
    """Up to `most` rows, drawn at random."""
    if len(x) <= most:
        return x
    return x.select(torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most].sort().values)


def _losses(
    variants: Mapping[str, Dictionary], read: Read, hook: str | None, loss_tokens: int, bos: bool
) -> dict[str, Loss]:
    if read.model is None or hook is None or not loss_tokens:
        return {}
    chosen = first_texts(read.texts, wrap_backend(read.model).tokenizer, loss_tokens)
    whole = {name: one for name, one in variants.items() if name == "own" or name in _WITH_LOSS}
    return spliced_losses(read.model, chosen, hook, whole, prepend_bos=bos)


def _atoms(dictionary: Any) -> Float[Tensor, "F d"]:
    return dictionary.W_dec.detach().float()


def command(
    sae: str,
    /,
    *more: str,
    other: str | None = None,
    model: str | None = None,
    hook: str | None = None,
    text: str | None = None,
    dataset: str | None = None,
    tokens: int = 65_536,
    loss_tokens: int = _LOSS_TOKENS,
    device: str = "auto",
    json: Path | None = None,
    page: Path | None = None,
    neuronpedia: Path | None = None,
    wandb: str | None = None,
) -> None:
    """Measure anybody's dictionary on held-out text, against nulls.

    Example: atom-lens audit runs/pursuit --text corpus.jsonl

    Args:
        sae: folder, file, user/name on the Hub, or release of sae-lens; of ours or another library
        more: further dictionaries of the same hook, each in a table of its own
        other: a dictionary whose atoms are matched with those of the first
        model: language model (default: the one that the dictionary names)
        hook: where it acts (default: the hook that the dictionary names); also chooses among several in one place
        text: file of text (a document per line) or of JSON lines (default: the Python language reference)
        dataset: data set on the Hub with a column `text`, streamed
        tokens: held-out tokens to read
        loss_tokens: held-out tokens that the cross-entropy is measured on; 0 for none
        device: where the model and the dictionary run
        json: also write the result to this file
        page: also write an HTML page to this file, with a browser of the latents
        neuronpedia: also write dashboards of all latents to this folder, in the files that Neuronpedia imports
        wandb: also log tables, numbers and page to this project of Weights & Biases
    """
    if text is not None and dataset is not None:
        raise AtomLensError(f"--text is {text!r} and --dataset {dataset!r}, allowed is one of them")
    found = audit(
        [sae, *more],
        other=other,
        model=model,
        hook=hook,
        text=text if dataset is None else HubDataset.model_validate({"path": dataset}),
        tokens=tokens,
        loss_tokens=loss_tokens,
        device=device,
        json=json,
        page=page,
        neuronpedia=neuronpedia,
    )
    say(study.text(found, sae))
    if wandb is not None:
        log_audit(found, wandb, page)
