"""What an audit reads: text of both sides of a split, through the model that the dictionaries name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformer_lens.loading_from_pretrained import get_official_model_name

from atom_lens.activations.connect import open_model, wrap_backend
from atom_lens.activations.harvest import harvest
from atom_lens.activations.models import find_model, load_tokenizer
from atom_lens.activations.prompts.files import HubDataset, JsonLines, TextFile
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.activations.prompts.standard_library import PythonDocs
from atom_lens.errors import AtomLensError
from atom_lens.recipe.contexts import Corpus, places_of
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.running import document_side, first_contexts
from atom_lens.recipe.sections import Split, Streaming
from atom_lens.studies.evaluate import recipe_beside
from atom_lens.tensors.rows import Rows

_SPLIT = Split.model_validate({"heldout": 0.5})


class Read(NamedTuple):
    """Activations of both sides, and where a model read them: a loss is measured on the held-out texts."""

    x: Rows
    heldout: Rows
    text: str
    model: Any = None
    corpus: Corpus | None = None

    @property
    def texts(self) -> list[Prompt]:
        """The held-out texts."""
        if self.corpus is None:
            return []
        held = self.corpus.places[self.corpus.heldout, 0].unique().tolist()
        return [self.corpus.prompts[i] for i in held]


def about(dictionary: Any, key: str) -> Any:
    return getattr(getattr(getattr(dictionary, "cfg", None), "metadata", None), key, None)


def agreed(opened: Mapping[str, Any], key: str, argument: str, given: str | None) -> str:
    """What the dictionaries say about themselves, or what `given` says about them."""
    said = {label: about(one, key) for label, one in opened.items()}
    values = {value for value in said.values() if value is not None}
    if key == "hook_name" and given is not None and not values:
        return given
    if len(values) > 1:
        each = ", ".join(f"{label!r} {value!r}" for label, value in said.items())
        raise AtomLensError(f"the dictionaries are for different {argument}s ({each}), an audit takes those of one")
    if not values:
        raise AtomLensError(f"{next(iter(opened))!r} does not say its {argument}: give {argument}=")
    return str(values.pop())


def official(name: str) -> str:
    """The id on the Hub of a model that TransformerLens knows by its own name."""
    if name.startswith("demo:") or Path(name).expanduser().exists():
        return name
    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def read_text_of(
    opened: Mapping[str, Any], saes: Sequence[Any], model: Any, hook: str, text: Any, tokens: int, device: str
) -> Read:
    dictionary = next(iter(opened.values()))
    width = dictionary.W_dec.shape[1]
    asked = Streaming.model_validate(
        {
            "context_size": min(max(2, int(about(dictionary, "context_size") or 128)), 1024),
            "metric_tokens": max(tokens // 2, 32 * width),
            "heldout_tokens": tokens,
        }
    )
    bos = about(dictionary, "prepend_bos") is not False
    source = _source(text)
    documents = source.documents() if isinstance(source, Source) else iter(source)
    split = _split(saes)
    tokenizer = load_tokenizer(find_model(model)) if isinstance(model, str) else wrap_backend(model).tokenizer
    texts = first_contexts(documents, tokenizer, asked, split, bos)
    found = harvest(
        model, texts, hook, "all", device=device, prepend_bos=bos, unique=True, max_tokens=asked.context_size
    )
    if hook not in found:
        raise AtomLensError(f"hook is {hook!r}, allowed is the name of one hook, such as {next(iter(found))!r}")
    out = torch.tensor([document_side(split, texts[i].group) == "heldout" for i in found.rows[hook][:, 0].tolist()])
    if int((~out).sum()) < width or int(out.sum()) < 2:
        raise AtomLensError(
            f"the text has {int((~out).sum())} activations for the metric and {int(out.sum())} held-out ones, at least "
            f"{width} and 2 are needed: give more text"
        )
    what = source.path if isinstance(source, TextFile | JsonLines | HubDataset) else getattr(source, "source", "texts")
    loaded = open_model(model, device=device) if isinstance(model, str) else model
    view = found.views[hook]
    seen = Corpus(view, texts, places_of(found.rows[hook], texts, tokenizer, bos), out)
    return Read(view.select(~out), view.select(out), str(what), loaded, seen)


def _source(text: Any) -> Source | list[Prompt]:
    if text is None:
        return PythonDocs.model_validate({})
    if isinstance(text, Source):
        return text
    if isinstance(text, str | Path):
        kind = JsonLines if str(text).endswith((".jsonl", ".json")) else TextFile
        return kind.model_validate({"path": str(text)})
    return [one if isinstance(one, Prompt) else Prompt(one) for one in text]


def _split(saes: Sequence[Any]) -> Split:
    """Half of the documents; for a run on running text, the documents that the run held out."""
    for one in saes:
        if isinstance(one, str | Path):
            try:
                recipe = load_recipe(recipe_beside(one))
            except AtomLensError:
                continue
            if recipe.stream is not None:
                return recipe.split
    return _SPLIT
