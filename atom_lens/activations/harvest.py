"""Harvest: activations of many prompts at many hooks, in one forward pass each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from atom_lens.activations.backends import BackendName
from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend, wrap_backend
from atom_lens.activations.hooks import expand_hooks
from atom_lens.activations.models import DTYPES, cache_folder, find_model
from atom_lens.activations.positions import Positions, Read, check_prompts, tokens_to_read
from atom_lens.activations.prompts.prompt import Prompt, as_prompts
from atom_lens.activations.store import Allocate, Stored, in_memory, store_key, stored
from atom_lens.errors import AtomLensError
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows


class Harvest(Mapping[str, Tensor]):
    """hook -> activations, shape (n, d), float32 whatever dtype the model ran in.

    Those of a named model are mapped from the store, not read into memory; where rows were dropped, indexing by a hook
    copies the others, and `views` does not.

    Attributes:
        views: hook -> the same rows, not yet read.
        rows: hook -> (n, 2), the prompt and the token that each row was read at.
        dropped: hook -> number of rows left out for their massive norm.
        limits: hook -> the largest norm that a row may have.
        seconds: time the harvest took.
        from_store: whether the activations were already on disk, so that no model was run.
        prepend_bos: whether a beginning-of-sequence token was prepended to the prompts.
    """

    def __init__(self) -> None:
        self.views: dict[str, Rows] = {}
        self.rows: dict[str, Tensor] = {}
        self.dropped: dict[str, int] = {}
        self.limits: dict[str, float] = {}
        self.seconds = 0.0
        self.from_store = False
        self.prepend_bos = False

    @override
    def __getitem__(self, hook: str) -> Float[Tensor, "n d"]:
        return self.views[hook][:]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    @override
    def __len__(self) -> int:
        return len(self.views)

    def add(self, hook: str, x: Float[Tensor, "N d"], rows: Int[Tensor, "N 2"], massive_ratio: float | None) -> None:
        """Add all rows of a hook except massive ones."""
        # First tokens and BOS (theory.md section 1).
        norms = x.norm(dim=1)
        self.limits[hook] = (massive_ratio or torch.inf) * float(norms.median())
        massive = norms > self.limits[hook]
        self.dropped[hook] = int(massive.sum())
        self.views[hook] = Rows(x) if not massive.any() else Rows(x, (~massive).nonzero()[:, 0])
        self.rows[hook] = rows[~massive]


def harvest(
    model: Any,
    prompts: Iterable[Prompt | str],
    hooks: Sequence[str] | str,
    positions: Positions = "subject_last",
    backend: BackendName = "auto",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    massive_ratio: float | None = 10.0,
    prepend_bos: bool = True,
    unique: bool = False,
    max_tokens: int = 1024,
    batch_tokens: int | None = None,
    store: str | Path | None = None,
    opened: Callable[[], Backend] | None = None,
) -> Harvest:
    """Activations of `prompts` at `hooks`.

    Args:
        model: a name (Hub id, folder, ``.gguf``, ``demo:gemma-3-270m``), a TransformerBridge, a HookedTransformer
            or an nnsight model. Only activations of named models are stored: a loaded one may have been changed.
        prompts: texts, or `Prompt`s where the position depends on a subject.
        hooks: hook names of TransformerLens, or globs such as ``blocks.*.hook_resid_post``.
        positions: "subject_last", "span", "last" or "all" (see `select_tokens`).
        backend: "transformer_lens", "nnsight", or "auto"; ignored for a loaded model.
        revision, dtype, device: how to load a named model.
        massive_ratio: rows whose norm exceeds this many times the median norm at their hook are left out and
            counted (first tokens and BOS distort the metric, theory.md section 1); None keeps all.
        prepend_bos: put the tokenizer's beginning-of-sequence token, if it has one, before every prompt.
        unique: read each token prefix only once: a causal model gives a repeated prefix the same activation, which
            could fall on both sides of a split. Off by default, so that rows and prompts correspond.
        max_tokens: longer prompts are cut, as they are at the model's own context length; only "all" may lose tokens.
        batch_tokens: tokens of a batch, padding included; None is 1,024 on a CPU, which fills its cache, and 16,384 on
            a GPU.
        store: folder of the activation store; None is the cache folder.
        opened: loads a named model, for callers who go on with it; None loads it, and lets it go afterwards.

    Raises:
        AtomLensError: no prompts, an unknown hook or model, a layer out of range, a subject that is not found or
            missing, tokens to read that are cut off, or NaN activations.
    """
    start = time.monotonic()
    prompts = as_prompts(prompts)
    check_prompts(prompts, positions)
    patterns = [hooks] if isinstance(hooks, str) else list(hooks)
    if dtype not in DTYPES:
        raise AtomLensError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    found = Harvest()
    reading: dict[str, Any] = {
        "positions": positions,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
        "prepend_bos": prepend_bos,
        "unique": unique,
    }
    if isinstance(model, str):
        source = find_model(model, revision)
        key = store_key(source, prompts, patterns, positions, DTYPES[dtype], max_tokens, backend, prepend_bos, unique)
        folder = (Path(store) if store is not None else cache_folder() / "activations") / key

        def run(allocate: Allocate) -> Stored:
            runner = opened() if opened else open_backend(source, backend, DTYPES[dtype], device)
            rows, values, bos = _run(runner, prompts, patterns, allocate, **reading)
            about = {"model": source.name, "revision": source.revision, "positions": positions, "prepend_bos": bos}
            return rows, values, {**about, "hooks": list(values)}

        (rows, values, about), found.from_store = stored(folder, run)
        found.prepend_bos = about["prepend_bos"]
    else:
        rows, values, found.prepend_bos = _run(wrap_backend(model), prompts, patterns, in_memory, **reading)
    for hook, x in values.items():
        found.add(hook, x, rows, massive_ratio)
    found.seconds = time.monotonic() - start
    return found


def _run(
    backend: Backend,
    prompts: Sequence[Prompt],
    patterns: Sequence[str],
    allocate: Allocate,
    batch_tokens: int | None,
    max_tokens: int,
    **rules: Any,
) -> tuple[Int[Tensor, "n 2"], dict[str, Float[Tensor, "n _"]], bool]:
    hooks = expand_hooks(patterns, backend.hooks, backend.n_layers)
    reads = tokens_to_read(backend.tokenizer, prompts, max_tokens=min(max_tokens, backend.n_ctx), **rules)
    rows = torch.tensor([(read.prompt, token) for read in reads for token in read.tokens])
    with tqdm(total=len(reads), desc="Harvest", unit="prompt") as bar:
        values = read_activations(backend, reads, hooks, allocate, batch_tokens, bar.update)
    return rows, values, reads[0].ids[0] == backend.tokenizer.bos_token_id


def read_activations(
    backend: Backend,
    reads: Sequence[Read],
    hooks: Sequence[str],
    allocate: Allocate = in_memory,
    batch_tokens: int | None = None,
    done: Callable[[int], Any] = lambda prompts: None,
    shared: bool = False,
) -> dict[str, Float[Tensor, "n _"]]:
    """hook -> activations at all tokens of `reads`, in their order; `done` is told the size of every batch.

    With `shared` every process asks for the same, reads its share of the batches, and gets all rows.
    """
    first_row = torch.tensor([0, *(len(read.tokens) for read in reads)]).cumsum(0).tolist()
    values: dict[str, Tensor] = {}
    budget = batch_tokens or (1024 if backend.device.type == "cpu" else 16_384)
    batches = list(_batches([len(read.ids) for read in reads], budget))
    shared = shared and len(batches) >= parallel.size()  # a process without a batch would not know the widths
    # Into files each process writes its own rows; in memory it would lack the rows of others, so that batches are
    # divided only when sharing is asked for.
    for batch in batches if allocate is in_memory and not shared else parallel.mine(batches):
        longest = len(reads[batch[0]].ids)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        # Padding on the right: under a causal mask no real token sees it, and positions count from 0.
        for row, i in enumerate(batch):
            ids[row, : len(reads[i].ids)] = torch.tensor(reads[i].ids)
            mask[row, : len(reads[i].ids)] = 1
        at = torch.tensor([(row, token) for row, i in enumerate(batch) for token in reads[i].tokens])
        to = torch.tensor([first_row[i] + k for i in batch for k in range(len(reads[i].tokens))])
        kept = backend.run(ids.to(backend.device), mask.to(backend.device), hooks, partial(_rows_at, at))
        if not values:  # after a real batch, so that errors name the shapes that occur there
            _check_causal(backend, hooks)
        for hook in hooks:
            x = _rows_of(hook, kept)
            if hook not in values:
                values[hook] = allocate(hook, first_row[-1], x.shape[1])
                if shared:
                    values[hook].zero_()
            values[hook][to] = x
        done(len(batch))
    return {hook: parallel.summed(x) for hook, x in values.items()} if shared else values


def _check_causal(backend: Backend, hooks: Sequence[str]) -> None:
    """Prompts are cut after the last token read: a model that looks ahead would then have read another text.

    Raises:
        AtomLensError: an activation of a token depends on the token after it.
    """
    tokens = torch.tensor([[0, 1], [0, 2]], device=backend.device)
    kept = backend.run(tokens, torch.ones_like(tokens), hooks, partial(_rows_at, torch.tensor([[0, 0], [1, 0]])))
    for hook, x in kept.items():
        if not torch.allclose(x[0], x[1], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise AtomLensError(f"hook {hook!r} depends on tokens that follow, allowed are hooks of causal models")


def _rows_at(at: Int[Tensor, "m 2"], hook: str, x: Tensor) -> Float[Tensor, "m _"]:
    if x.ndim != 3:
        raise AtomLensError(f"hook {hook!r} has shape {tuple(x.shape)}, expected (batch, pos, width)")
    return x[at[:, 0], at[:, 1]]


def _rows_of(hook: str, kept: dict[str, Tensor]) -> Float[Tensor, "m _"]:
    if hook not in kept:
        raise AtomLensError(f"hook {hook!r} is named by the model but never fires in its forward pass")
    x = kept[hook]
    if not torch.isfinite(x).all():
        raise AtomLensError(f"hook {hook!r} gave NaN or infinite activations (dtype {x.dtype}): try float32")
    return x.cpu().float()  # exact for 16-bit dtypes, and what the store returns


def _batches(lengths: Sequence[int], budget: int) -> Iterable[list[int]]:
    """Indices, longest first, in batches of up to `budget` tokens, padding included.

    A batch that is a quarter full accepts no prompt that would need more than a tenth of padding.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else 0
        padded = lengths[i] < 0.9 * longest and 4 * len(batch) * longest >= budget
        if batch and (padded or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        batch.append(i)
    yield batch
