"""The numbers of one dictionary: what edits of its codes do to facts, each with its 95% interval over facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries import Trained, find_kind
from atom_lens.errors import AtomLensError
from atom_lens.evidence.bootstrap import mean_interval, ratio_interval
from atom_lens.evidence.results import Figures
from atom_lens.interventions.causal import Evaluation, Swaps, third
from atom_lens.interventions.facts import Scores, ask
from atom_lens.interventions.splice import splice
from atom_lens.recipe.recipe import register_section
from atom_lens.storage.schema import Positive, Section
from atom_lens.studies.intervene.result import Ablation, Cell, ClassMeans, Dose, HeldOut, Mean, Swap
from atom_lens.studies.named import KINDS, Features, KindName
from atom_lens.tensors import checks as inputs
from atom_lens.tensors.checks import Labels
from atom_lens.tensors.rows import Rows, mean_row


class Intervene(Section):
    """Facts to intervene on; prompts need answers. The hook is the one with the highest ceiling on training facts.

    `kinds` are trained at the sparsities `l0` (ReLU SAEs: `l1`) as in `compare`; `run` adds the atoms of a
    run folder.
    """

    kinds: list[KindName] = Field(["tsae_free", "topk_whitened"], validation_alias=KINDS)
    l0: list[Positive] = Field([6.0, 32.0], min_length=1)
    l1: list[Positive] = Field([5.0], min_length=1)
    run: str | None = None
    features: list[Features] = []
    facts: int = Field(240, ge=10, description="held-out facts that the model knows, at most")
    scan: int = Field(100, ge=10, description="training facts on which the hook is chosen, at most")
    doses: list[float] = [0.25, 0.5, 0.75, 1.0, 2.0]
    ks: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 16], min_length=1)
    installed_k: int = Field(4, ge=1, description="atoms ablated where specificity is measured")
    other_templates: list[str] = []

    @model_validator(mode="after")
    def _kinds_have_codes(self) -> Intervene:
        for name in self.kinds:
            if not isinstance(find_kind(name), Trained):
                raise AtomLensError(f"intervene.kinds has {name!r}, allowed are kinds that are trained")
        for template in self.other_templates:
            if template.count("{}") != 1:
                raise AtomLensError(f"intervene.other_templates has {template!r}, allowed are texts with one {{}}")
        return self


register_section("intervene", Intervene, Intervene.model_validate({}))


def patched(model: Any, hook: str, pairs: Swaps, values: Float[Tensor, "n d"], **reading: Any) -> Scores:
    """Answers when `values` replace A's activation."""
    # A patch does not use the atoms it is spliced with.
    blank = SAE.from_dict({"architecture": "standard", "d_in": values.shape[1], "d_sae": 1})
    edits = {"patch": lambda batch: splice(model, {hook: blank}).patch(values[batch.rows], positions=batch.subject)}
    return ask(model, pairs.prompts, pairs.answers, edits, **reading)["patch"]


def class_means(
    model: Any,
    hook: str,
    pairs: Swaps,
    x: Float[Tensor | Rows, "n d"],
    labels: Labels,
    seed: int,
    **reading: Any,
) -> ClassMeans:
    """The strongest simple edit: the difference of the mean activations of both answers. It is told the answers.

    Args:
        model, hook, pairs: as in `Evaluation`.
        x, labels: training activations and their answers; an answer without activations takes the mean of all.
        seed: of the intervals.
        reading: positions and prepend_bos.
    """
    means, names = {}, inputs.labels(labels, len(x), "labels")
    for answer in {answer for both in pairs.answers for answer in both}:
        rows = torch.tensor([label == answer for label in names])
        means[answer] = x[rows].mean(dim=0) if bool(rows.any()) else mean_row(x).to(x.dtype)
    moved = pairs.seen.x + torch.stack([means[new] - means[old] for old, new in pairs.answers])
    clean = ask(model, pairs.prompts, pairs.answers, {"none": None}, **reading)["none"]
    return ClassMeans(**dict(swapped(patched(model, hook, pairs, moved, **reading), clean, seed)))


def cell(
    name: str, figures: Figures, evaluation: Evaluation, train: Evaluation, settings: Intervene, texts: Sequence[Prompt]
) -> Cell:
    """Swaps, doses, ablations and divergences of one dictionary.

    Args:
        name: of the dictionary.
        figures: its numbers on held-out activations.
        evaluation: the dictionary on facts about held-out subjects.
        train: the same on facts about subjects that it was trained on, only for swaps.
        settings: doses, numbers of ablated atoms, other templates.
        texts: texts that edits should leave alone; the edits of each fact are tried on one of them.
    """
    seed = evaluation.seed
    apart = [dose for dose in settings.doses if dose != 1]  # dose 1 is the swap itself, and its null
    scores, doses = evaluation.swap(apart)
    nulls = evaluation.null_doses(apart)
    doses = {dose: doses.get(dose, scores["swap"]) for dose in settings.doses}
    memorised, _ = train.swap(kinds=("none", "patch", "swap", "replace"))
    clean, pairs, k = scores["none"], evaluation.swaps, settings.installed_k
    flips = {name: found.greedy[:, 1].float() for name, found in scores.items()}
    divergences = {
        "unrelated": evaluation.spared(
            [texts[i % len(texts)] for i in range(len(pairs.prompts))], k, positions="all", max_tokens=32
        ),
        "neighbours": evaluation.spared([pairs.prompts[i] for i in third(pairs)], k),
    }
    if settings.other_templates:
        divergences["same_subject"] = evaluation.same_subject(settings.other_templates, k)
    intact, ablated = evaluation.ablate(settings.ks)
    return Cell(
        name=name,
        heldout=HeldOut(**{key: figures[key] for key in HeldOut.model_fields}),
        swap={name: swapped(found, clean, seed) for name, found in scores.items()},
        train={name: swapped(found, memorised["none"], seed) for name, found in memorised.items()},
        of_ceiling={
            name: _mean(ratio_interval(flips[name], flips["patch"], seed)) for name in ("swap", "replace", "exchange")
        },
        doses=[
            Dose(
                dose=dose,
                of_ceiling=_mean(ratio_interval(found.greedy[:, 1].float(), flips["patch"], seed)),
                null=swapped(nulls.get(dose, scores["other"]), clean, seed),
                **dict(swapped(found, clean, seed)),
            )
            for dose, found in doses.items()
        ],
        monotone=_monotone(clean, doses, seed),
        ablate=[
            Ablation(
                rank=rank,
                k=k,
                drop=Mean(**mean_interval((intact.logprob - found.logprob)[:, 0], seed)),
                lost=Mean(**mean_interval((~found.greedy[:, 0]).float(), seed)),
            )
            for (rank, k), found in ablated.items()
        ],
        kl={
            where: {name: Mean(**mean_interval(values, seed)) for name, values in found.items()}
            for where, found in divergences.items()
        },
    )


def _mean(found: dict[str, Any] | None) -> Mean | None:
    return None if found is None else Mean(**found)


def swapped(scores: Scores, clean: Scores, seed: int) -> Swap:
    """Share of answers flipped to B's, share kept at A's, and the rise of the log-odds of B over A in nats."""
    return Swap(
        flips=Mean(**mean_interval(scores.greedy[:, 1].float(), seed)),
        kept=Mean(**mean_interval(scores.greedy[:, 0].float(), seed)),
        log_odds=Mean(**mean_interval(_odds(scores) - _odds(clean), seed)),
    )


def _odds(scores: Scores) -> Float[Tensor, " n"]:
    return scores.logprob[:, 1] - scores.logprob[:, 0]


def _monotone(clean: Scores, doses: Mapping[float, Scores], seed: int) -> Mean | None:
    """Share of facts whose log-odds of B over A rise with every dose from 0 to 1; None without such doses."""
    chosen = [_odds(doses[dose]) for dose in sorted(doses) if 0 < dose <= 1]
    if not chosen:
        return None
    rising = (torch.stack([_odds(clean), *chosen]).diff(dim=0) > 0).all(dim=0)
    return Mean(**mean_interval(rising.float(), seed))
