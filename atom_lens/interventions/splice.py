"""Splice: atoms in the forward pass of a live model, so that editing codes changes what the model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.hooks import expand_hooks
from atom_lens.dictionaries.protocol import check_folded
from atom_lens.errors import AtomLensError
from atom_lens.interventions import edits
from atom_lens.interventions.edits import Edit, Place, Value
from atom_lens.tensors.checks import Which, indices


@dataclass
class _Site:
    """The atoms at one hook, and what is done to their codes."""

    atoms: SAE[Any]
    edits: list[Edit] = field(default_factory=list)
    patches: list[tuple[Tensor, Place]] = field(default_factory=list)


# Trained BatchTopK SAEs are saved as jumprelu; during training they choose across the batch.
_ACROSS_ROWS = ("temporal", "batchtopk", "matryoshka_batchtopk")


class Splice:
    """Atoms in a model, made by `splice`. Edits act while its ``with`` block is open, until `clear` takes them back.

    An edit acts through the difference it makes, x + decode(z') - decode(z): what the atoms do not explain stays as
    it is, and no error term cancels an ablation. Edits of one hook act in the order they were given.
    """

    def __init__(self, backend: Backend, atoms: Mapping[str, SAE[Any]], replace: bool) -> None:
        self.backend = backend
        self.replace = replace
        self._sites = {hook: _Site(sae) for hook, sae in atoms.items()}
        self._open = ExitStack()
        self._is_open = False

    @property
    def hooks(self) -> list[str]:
        """Where atoms are spliced."""
        return list(self._sites)

    def __enter__(self) -> Splice:
        if self.backend.tracing:
            raise AtomLensError("a splice was opened inside a running nnsight trace: open the splice first, then trace")
        if self._is_open:
            raise AtomLensError("this splice is already open: make another one with splice() to nest them")
        with ExitStack() as attached:
            for hook, site in self._sites.items():
                attached.callback(self.backend.attach(hook, _change(hook, site, self.replace)))
            self._open = attached.pop_all()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._open.close()

    def apply(self, edit: Edit, hook: str | None = None) -> Splice:
        """Add an edit at `hook`, which may be omitted where atoms are spliced at one hook only.

        Raises:
            AtomLensError: no such hook in this splice, or an atom that the dictionary does not have.
        """
        name, site = self._site(hook)
        n_atoms = site.atoms.cfg.d_sae
        if edit.atoms is not None:
            indices(edit.atoms, n_atoms, "atom", f"the dictionary at {name!r}")
        site.edits.append(edit)
        return self

    def ablate(self, atoms: Which | None = None, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = 0 for `atoms`, or for all. `place`: ``positions=``, ``items=`` as in `Place`, here and below."""
        return self.apply(edits.ablate(atoms, **place), hook)

    def scale(self, atoms: Which | None, factor: Value, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = factor z."""
        return self.apply(edits.scale(atoms, factor, **place), hook)

    def set(self, atoms: Which | None, value: Value, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = value."""
        return self.apply(edits.assign(atoms, value, **place), hook)

    def add(self, atoms: Which | None, amount: Value, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = z + amount: steering along atoms, whether they fire or not."""
        return self.apply(edits.add(atoms, amount, **place), hook)

    def keep_only(self, atoms: Which, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = 0 for all other atoms."""
        return self.apply(edits.keep_only(atoms, **place), hook)

    def swap(self, codes: Tensor, *, hook: str | None = None, **place: Any) -> Splice:
        """z' = codes, the whole code of another subject: (F,), or (batch, F) for a code per item."""
        return self.apply(edits.swap(codes, **place), hook)

    def exchange(self, old: Tensor, new: Tensor, *, hook: str | None = None, **place: Any) -> Splice:
        """Exchange as much of `old` as is present for `new`, wherever it is (see `edits.exchange`)."""
        return self.apply(edits.exchange(old, new, **place), hook)

    def patch(self, values: Tensor, *, hook: str | None = None, **place: Any) -> Splice:
        """x' = values, (d,) or (batch, d), including what the atoms leave out: the ceiling of any swap of codes."""
        _, site = self._site(hook)
        site.patches.append((values, Place(**place)))
        return self

    def clear(self, hook: str | None = None) -> Splice:
        """Remove all edits, at `hook` or everywhere; the atoms stay spliced."""
        for name in [hook] if hook else self._sites:
            _, site = self._site(name)
            site.edits.clear()
            site.patches.clear()
        return self

    def _site(self, hook: str | None) -> tuple[str, _Site]:
        if hook is None and len(self._sites) == 1:
            hook = next(iter(self._sites))
        if hook not in self._sites:
            raise AtomLensError(f"hook is {hook!r}, atoms are spliced at {', '.join(self._sites)}")
        return hook, self._sites[hook]


def splice(
    model: Any, atoms: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any]], *, replace: bool = False
) -> Splice:
    """Put atoms, or any sae-lens SAEs, into a live model: ``with splice(model, atoms) as s: s.ablate(3); model(...)``.

    Works in every forward pass while the block is open: plain calls, TransformerLens' run_with_hooks and
    run_with_cache, nnsight traces, generation with or without a KV cache. Gradients flow through codes and edits.
    Without edits nothing is computed and nothing changes.

    Args:
        model: a TransformerBridge, SAETransformerBridge, HookedTransformer, or nnsight model.
        atoms: one SAE, several at different hooks (their metadata says where), or hook -> SAE.
        replace: replace the activation by the reconstruction, at every position, instead of adding the difference that
            edits make.

    Raises:
        AtomLensError: a hook that this model lacks or that is given two SAEs, an SAE that reads and writes different
            hooks, a model without hooks, a splice inside a running nnsight trace. While running: a width that does
            not fit, a position outside the prompt.
    """
    backend = wrap_backend(model)
    if not isinstance(atoms, Mapping):
        several = [atoms] if isinstance(atoms, SAE) else list(atoms)
        atoms = {}
        for sae in several:
            hook = sae.cfg.metadata.hook_name
            if not hook:
                raise AtomLensError("an SAE does not say which hook it belongs to: give {hook: sae}")
            if hook in atoms:
                raise AtomLensError(f"two SAEs belong to hook {hook!r}, a splice takes one: nest splices to have both")
            atoms[hook] = sae
    for hook, sae in atoms.items():
        if expand_hooks([hook], backend.hooks, backend.n_layers) != [hook]:
            raise AtomLensError(f"hook {hook!r} is a pattern, a splice takes names")
        check_folded(sae, f"the SAE at {hook!r}")
        if (architecture := sae.cfg.architecture()) in _ACROSS_ROWS:
            raise AtomLensError(
                f"the SAE at {hook!r} has architecture {architecture!r}, whose codes depend on other tokens or items: "
                "a splice takes SAEs that encode each activation by itself"
            )
        if (writes := sae.cfg.metadata.hook_name_out) and writes != sae.cfg.metadata.hook_name:
            raise AtomLensError(
                f"the SAE at {hook!r} writes to {writes!r}: a splice takes SAEs that write where they read"
            )
    return Splice(backend, atoms, replace)


def _change(hook: str, site: _Site, replace: bool) -> Callable[[Tensor, int], Tensor | None]:
    """What a splice does at one hook in one forward pass."""

    def change(x: Tensor, past: int) -> Tensor | None:
        if not (site.edits or site.patches or replace):
            return None
        width, d_in = x.shape[2:].numel(), site.atoms.cfg.d_in
        if x.ndim < 3 or width != d_in:
            raise AtomLensError(
                f"hook {hook!r} has activations of shape {tuple(x.shape)}, these atoms have d_in {d_in}"
            )
        size = (len(x), x.shape[1], past, x.device)
        masks = [edit.place.mask(*size) for edit in site.edits]
        everywhere = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        acts = everywhere if replace else torch.stack([~everywhere, *masks]).any(dim=0)
        result = x
        if bool(acts.any()):
            rows, items = x[acts].reshape(-1, width), acts.nonzero()[:, 0]
            chosen = [(edit, mask[acts]) for edit, mask in zip(site.edits, masks, strict=True)]
            result = x.clone()
            result[acts] = _edited(site.atoms, rows, items, chosen, replace).reshape(-1, *x.shape[2:])
        for values, place in site.patches:
            mask = place.mask(*size)
            like = x.new_empty(int(mask.sum()), width)
            new = edits.rows_of(values, like, mask.nonzero()[:, 0]).expand_as(like)
            result = result.clone()
            result[mask] = new.reshape(-1, *x.shape[2:])
        return result

    return change


def _edited(
    sae: SAE[Any],
    x: Float[Tensor, "rows d"],
    items: Tensor,
    chosen: Sequence[tuple[Edit, Tensor]],
    replace: bool,
) -> Float[Tensor, "rows d"]:
    with heads_merged(sae):
        codes = new = sae.encode(x.to(sae.W_dec))
        for edit, rows in chosen:
            new = torch.where(rows.to(new.device)[:, None], edit(new, items.to(new.device)), new)
        # Both in one call: after decoding, sae-lens forgets the norm that it divided by.
        after, before = sae.decode(torch.stack([new, codes]))
    return after.to(x) if replace else x + (after - before).to(x)


@contextmanager
def heads_merged(sae: SAE[Any]) -> Iterator[None]:
    """Stop an SAE of hook_z from merging heads, and restore its state afterwards: rows are merged already."""
    names = ("hook_z_reshaping_mode", "reshape_fn_in", "reshape_fn_out", "d_head")
    kept = {name: getattr(sae, name) for name in names if hasattr(sae, name)}
    if sae.hook_z_reshaping_mode:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(sae, name, value)
