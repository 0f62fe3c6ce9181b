"""What the dictionaries of a study cost the model: its loss on held-out texts with each of them spliced in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from atom_lens.activations.connect import open_model, wrap_backend
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries import Dictionary
from atom_lens.errors import AtomLensError
from atom_lens.evidence.results import Loss
from atom_lens.interventions.loss import first_texts, spliced_losses
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.split import prompts_of, sides


class Costs:
    """Cross-entropy and KL of the recipe's model with a dictionary spliced in.

    The model is loaded for the first dictionary: a resumed study may have none left to measure.

    Args:
        recipe: gives the model and the texts.
        study: for messages.
        tokens: held-out tokens that the loss is taken of; 0 for none.

    Raises:
        AtomLensError: a loss is asked for, and the dictionaries are not of all tokens.
    """

    def __init__(self, recipe: Recipe, study: str, tokens: int) -> None:
        if tokens and recipe.positions != "all":
            raise AtomLensError(
                f"{study}.loss_tokens is {tokens} and positions {recipe.positions!r}, a loss needs dictionaries of all "
                "tokens: set positions: all, or loss_tokens: 0"
            )
        self.recipe, self.tokens = recipe, tokens

    @cached_property
    def _model(self) -> object:
        asked = self.recipe.model
        return open_model(asked.name, asked.backend, revision=asked.revision, dtype=asked.dtype, device=asked.device)

    @cached_property
    def _texts(self) -> list[Prompt]:
        prompts = prompts_of(self.recipe)
        out, _ = sides(self.recipe, [prompt.group for prompt in prompts])
        held = [prompt for prompt, is_out in zip(prompts, out.tolist(), strict=True) if is_out]
        return first_texts(held, wrap_backend(self._model).tokenizer, self.tokens)

    def of(self, dictionaries: Sequence[Dictionary], hook: str) -> list[Loss | None]:
        """The loss with each of them at `hook`; None for each if no loss is asked for."""
        if not self.tokens:
            return [None] * len(dictionaries)
        named = {str(number): one for number, one in enumerate(dictionaries)}
        return list(spliced_losses(self._model, self._texts, hook, named, self.recipe.prepend_bos).values())
