"""Causal evaluation of atoms on facts: what edits of codes do to answers, with a ceiling, a floor and nulls.

Every fact A has a partner B, another subject with another answer. Edits act at A's token, through the difference they
make; the whole activation of B in its place is the ceiling, random atoms with a change of the same norm are the null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.positions import Positions
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.interventions.attribution import Read, attribution, read
from atom_lens.interventions.facts import Batch, Prepare, Scores, ask, divergence
from atom_lens.interventions.splice import Splice, splice
from atom_lens.tensors.checks import checked_seed

Doses = Mapping[float, Scores]
KINDS = ("none", "patch", "swap", "replace", "exchange", "random", "other", "rest")


class Swaps(NamedTuple):
    """Facts and their partners.

    Attributes:
        prompts: about A, n of them.
        answers: for every fact A's answer, then B's.
        seen: activations at A's token, and the gradient of A's answer with respect to them.
        target: activations at B's token.
    """

    prompts: list[Prompt]
    answers: list[tuple[str, str]]
    seen: Read
    target: Float[Tensor, "n d"]


def pair(prompts: Sequence[Prompt], generator: torch.Generator) -> list[int]:
    """For every fact the index of another one with another answer, drawn at random.

    Raises:
        AtomLensError: all facts have one answer.
    """
    answers = [prompt.answer for prompt in prompts]
    if len(set(answers)) < 2:
        raise AtomLensError(
            f"the {len(prompts)} facts have {len(set(answers))} different answers, a swap needs at least 2"
        )
    partners = []
    for answer in answers:
        # An answer that starts another one (Guinea, Guinea-Bissau) would count as both.
        others = [i for i, other in enumerate(answers) if not _begins(str(answer), str(other))]
        if not others:
            raise AtomLensError(
                f"answer {answer!r} starts every other answer or is started by it: a swap needs another answer"
            )
        partners.append(others[int(torch.randint(len(others), (), generator=generator))])
    return partners


def _begins(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


class Evaluation:
    """Edits of one dictionary at one hook, on the same facts.

    Args:
        model: as of `splice`.
        hook: where the atoms act.
        sae: the atoms; an SAE that rescales its input at run time is refused, because the same code would mean a
            different change each time.
        swaps: the facts.
        positions: which token of the subject; one per prompt.
        prepend_bos: whether prompts begin with BOS.
        seed: of the random atoms.
    """

    def __init__(
        self,
        model: Any,
        hook: str,
        sae: SAE[Any],
        swaps: Swaps,
        positions: Positions = "subject_last",
        prepend_bos: bool = True,
        seed: int = 0,
    ) -> None:
        self.backend, self.hook, self.sae, self.swaps = wrap_backend(model), hook, sae, swaps
        self.reading: dict[str, Any] = {"positions": positions, "prepend_bos": prepend_bos}
        self.seed = checked_seed(seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        if (scaling := sae.cfg.normalize_activations) in ("layer_norm", "constant_norm_rescale"):
            raise AtomLensError(f"the SAE at {hook!r} has normalize_activations {scaling!r}, allowed are SAEs without")
        with torch.no_grad():
            self.codes = sae.encode(swaps.seen.x.to(sae.W_dec))
            self.target_codes = sae.encode(swaps.target.to(sae.W_dec))
            self.reconstructed = sae.decode(self.target_codes).cpu().float()
        self.attribution = attribution(sae, swaps.seen)

    def at(self, do: Callable[[Splice, Batch], Splice], replace: bool = False) -> Prepare:
        """An edit, ready to be opened for a batch."""
        return lambda batch: do(splice(self.backend, {self.hook: self.sae}, replace=replace), batch)

    @torch.no_grad()
    def decoded(self, change: Float[Tensor, "n F"]) -> Float[Tensor, "n d"]:
        """The change of the activation that a change of codes causes."""
        return (self.sae.decode(change) - self.sae.decode(torch.zeros_like(change))).cpu().float()

    def random_like(self, change: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """A change of as many atoms as `change` has, drawn at random, that moves the activation by the same norm."""
        ranks = torch.rand(change.shape, generator=self.generator).argsort(dim=1).argsort(dim=1).to(change.device)
        drawn = torch.randn(change.shape, generator=self.generator).to(change)
        drawn = drawn * (ranks < (change != 0).sum(dim=1, keepdim=True))
        norms = [self.decoded(codes).norm(dim=1, keepdim=True) for codes in (change, drawn)]
        return drawn * (norms[0] / norms[1].clamp(min=1e-12)).to(change)

    def other_like(self, change: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """The change towards the code of a third subject, whose answer is neither A's nor B's, with the same norm."""
        towards = self.codes[third(self.swaps)] - self.codes
        norms = [self.decoded(codes).norm(dim=1, keepdim=True) for codes in (change, towards)]
        return towards * (norms[0] / norms[1].clamp(min=1e-12)).to(change)

    def swap(self, doses: Sequence[float] = (), kinds: Sequence[str] = KINDS) -> tuple[dict[str, Scores], Doses]:
        """B's code for A's: efficacy of every kind of swap, and of the swap at other doses.

        Args:
            doses: factors of the difference of codes.
            kinds: which of the kinds below.

        Returns:
            "none": no edit, the floor. "patch": B's whole activation, the ceiling. "swap": x + (z_B - z_A) D.
            "replace": decode(z_B) alone. "exchange": by code, at every token, without knowing where the subject is.
            "random": as many random atoms, a change of the same norm. "other": towards a third subject's code, the same
            norm. "rest": what the patch does beyond the swap. And
            dose -> scores of x + dose (z_B - z_A) D.
        """
        before, after, change = self.codes, self.target_codes, self.target_codes - self.codes
        rest = self.swaps.target - self.decoded(change)
        random, other = self.random_like(change), self.other_like(change)
        every: dict[str, Prepare | None] = {
            "none": None,
            "patch": self.at(lambda s, b: s.patch(self.swaps.target[b.rows], positions=b.subject)),
            "swap": self.at(lambda s, b: s.swap(after[b.rows], positions=b.subject)),
            "replace": self.at(lambda s, b: s.patch(self.reconstructed[b.rows], positions=b.subject)),
            "exchange": self.at(lambda s, b: s.exchange(before[b.rows], after[b.rows])),
            "random": self._added(random),
            "other": self._added(other),
            "rest": self.at(lambda s, b: s.patch(rest[b.rows], positions=b.subject)),
        }
        names = {kind: every[kind] for kind in kinds}
        names |= {f"dose {dose}": self._added(dose * change) for dose in doses}
        found = ask(self.backend, self.swaps.prompts, self.swaps.answers, names, **self.reading)
        return found, {dose: found.pop(f"dose {dose}") for dose in doses}

    def null_doses(self, doses: Sequence[float]) -> Doses:
        """The null "other" of `swap` at other doses: towards a third subject's code, with the norm of that dose."""
        other = self.other_like(self.target_codes - self.codes)
        names = {str(dose): self._added(dose * other) for dose in doses}
        found = ask(self.backend, self.swaps.prompts, self.swaps.answers, names, **self.reading)
        return {dose: found[str(dose)] for dose in doses}

    def _added(self, change: Float[Tensor, "n F"]) -> Prepare:
        return self.at(lambda s, b: s.add(None, change[b.rows], positions=b.subject))

    def strongest(self, score: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n F"]:
        """1 for the k atoms that fire with the largest score, for every fact; else 0."""
        fires = score.masked_fill(self.codes == 0, -torch.inf)
        chosen = torch.zeros_like(score).scatter(1, fires.topk(min(k, score.shape[1]), dim=1).indices, 1.0)
        return chosen * (self.codes != 0)

    def ablate(self, ks: Sequence[int]) -> tuple[Scores, dict[tuple[str, int], Scores]]:
        """Scores of A's answer, and of A's answer without its k strongest atoms: (rank, k) -> scores.

        Ranks are "attribution", "activation" and, as a null, "random": as many random atoms, a change of the norm of
        that by attribution.
        """
        names: dict[str, Prepare | None] = {"none": None}
        for k in ks:
            for name, score in (("attribution", self.attribution), ("activation", self.codes)):
                factor = 1 - self.strongest(score, k)
                names[f"{name} {k}"] = self.at(
                    lambda s, b, factor=factor: s.scale(None, factor[b.rows], positions=b.subject)
                )
            random = self.random_like(self.strongest(self.attribution, k) * self.codes)
            names[f"random {k}"] = self._added(random)
        answers = [(answer,) for answer, _ in self.swaps.answers]
        found = ask(self.backend, self.swaps.prompts, answers, names, **self.reading)
        ranks = ("attribution", "activation", "random")
        return found["none"], {(rank, k): found[f"{rank} {k}"] for rank in ranks for k in ks}

    def installed(self, k: int) -> dict[str, Prepare]:
        """Edits that act at every token of any prompt, BOS included: exchange A for B by code, ablate A's k strongest.

        "steer" adds the change from A to B everywhere, whatever the code: it shows what an exchange gains by matching.
        """
        before, after, change = self.codes, self.target_codes, self.target_codes - self.codes
        factor = 1 - self.strongest(self.attribution, k)
        return {
            "exchange": self.at(lambda s, b: s.exchange(before[b.rows], after[b.rows])),
            "steer": self.at(lambda s, b: s.add(None, change[b.rows])),
            "ablate": self.at(lambda s, b: s.scale(None, factor[b.rows])),
        }

    def spared(self, prompts: Sequence[Prompt], k: int, **reading: Any) -> dict[str, Float[Tensor, " n"]]:
        """KL of the next token of `prompts`, the i-th under the edits `installed` for the i-th fact."""
        return divergence(self.backend, prompts, self.installed(k), **{**self.reading, **reading})

    def same_subject(self, templates: Sequence[str], k: int) -> dict[str, Float[Tensor, " n"]]:
        """KL of other prompts about A, averaged over `templates`, with edits at A's token.

        Not all of it is damage: B's other facts differ from A's, and a whole patch changes them too.
        """
        factor = 1 - self.strongest(self.attribution, k)
        names: dict[str, Prepare] = {
            "patch": self.at(lambda s, b: s.patch(self.swaps.target[b.rows], positions=b.subject)),
            "swap": self.at(lambda s, b: s.swap(self.target_codes[b.rows], positions=b.subject)),
            "ablate": self.at(lambda s, b: s.scale(None, factor[b.rows], positions=b.subject)),
        }
        parts = [
            divergence(
                self.backend,
                [Prompt.fill(template, str(prompt.subject)) for prompt in self.swaps.prompts],
                names,
                **self.reading,
            )
            for template in templates
        ]
        return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in names}


def third(pairs: Swaps) -> list[int]:
    """For every fact the next one whose answer is neither of its two, or just the next one where there is none."""
    answers = [own for own, _ in pairs.answers]
    chosen = []
    for i, both in enumerate(pairs.answers):
        others = [(i + step) % len(answers) for step in range(1, len(answers))]
        chosen.append(next((j for j in others if answers[j] not in both), others[0]))
    return chosen


def known(
    model: Any, prompts: Sequence[Prompt], positions: Positions = "subject_last", prepend_bos: bool = True
) -> list[int]:
    """Which prompts the model completes with the whole of their answer by greedy decoding."""
    answers = [(str(prompt.answer),) for prompt in prompts]
    scores = ask(model, prompts, answers, {"none": None}, positions, prepend_bos)["none"]
    return scores.greedy[:, 0].nonzero()[:, 0].tolist()


def swaps(
    model: Any,
    hook: str,
    prompts: Sequence[Prompt],
    generator: torch.Generator,
    positions: Positions = "subject_last",
    prepend_bos: bool = True,
) -> Swaps:
    """Pair facts, and read their activations at `hook`."""
    partners = pair(prompts, generator)
    seen = read(model, hook, prompts, [str(p.answer) for p in prompts], positions, prepend_bos)
    answers = [(str(p.answer), str(prompts[j].answer)) for p, j in zip(prompts, partners, strict=True)]
    return Swaps(list(prompts), answers, seen, seen.x[partners])
