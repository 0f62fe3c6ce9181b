"""The study of `atom-lens judge`: purity first, then blinded questions to a language model, cached and capped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME

from atom_lens.dictionaries.load import atoms_folder, load_atoms
from atom_lens.errors import AtomLensError
from atom_lens.evidence.purity import LEAST
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.storage.files import locked, sweep, write_json
from atom_lens.storage.terminal import say
from atom_lens.storage.versions import versions
from atom_lens.studies.evaluate import check_split, recipe_beside
from atom_lens.studies.judge.asking import ask_all, estimate
from atom_lens.studies.judge.client import Budget, Judge
from atom_lens.studies.judge.kinds import CONTROL, NOT_ASKED, label_purity, read_kinds
from atom_lens.studies.judge.sampling import VERSION, Case, draw_cases
from atom_lens.studies.judge.tables import judge_table


def judge(
    run: str | Path,
    *,
    hook: str | None = None,
    overrides: Sequence[str] = (),
    model: str | None = None,
    base_url: str | None = None,
    second_model: str | None = None,
    human: str | Path | None = None,
    latents: int = 50,
    contexts: int = 10,
    budget: float | None = None,
    prices: Sequence[float] = (0.0, 0.0),
    seed: int = 0,
    dry_run: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Whether the contexts of a run's atoms have one thing in common, compared with neurons and nulls (docs/judge.md).

    Writes judge.json, the answers under cache/, and blind.csv, the same questions for a person; a dry run writes
    nothing.

    Args:
        run: run folder.
        hook: which atoms, if the run has several hooks; ``<hook>/seed-1`` for those of another seed.
        overrides: ``section.key=value``, of the run's recipe.
        model: the judge, by its name on the server; None measures purity only.
        base_url: of any OpenAI-compatible server; None takes $OPENAI_BASE_URL, or else OpenAI. Its key is
            $OPENAI_API_KEY, which a server on this machine does not need.
        second_model: on the same server, asked for the same scores.
        human: CSV of a person's scores with the columns question and score: blind.csv, filled in.
        latents: how many latents are drawn of each kind.
        contexts: how many contexts of each latent are shown; as many others are tested.
        budget: dollars at most for all answers in `out`, including those of earlier calls; None is 1 with prices, and
            no cap without.
        prices: dollars per million tokens read and written.
        seed: of draws and shuffles.
        dry_run: count questions, tokens and dollars, ask nothing.
        out: folder; None takes judge/ in the run folder (judge/<hook> for several hooks, or another seed).

    Returns:
        The content of judge.json. `purity` has `heldout` and `all`, and is null without answers: `n` rows with a label,
        `labels`, `commonest_label` (its share), and per kind `latents`, `left_out`, `active_p50` (rows of the median
        latent), `entropy` (bits), and for `information` and `purity` each `mean`, `null`, `null_interval`, `excess`,
        `above_null` and `above_null_fdr`. `judge` is null without one: `complete`, `questions`, `answered`, `read` and
        `written` (tokens), `dollars`; per kind `rubric` and `detection` with `asked`, `unparsed`, `n`, `mean`,
        `interval`, `above_control` and `above_control_interval`; `agreement` with `spearman` and `kappa`; `latents`,
        each with its `explanation`, `score` and `detection`.

    Raises:
        AtomLensError: arguments out of range, a run that cannot be read, or a server that does not answer.
    """
    _check(model, second_model, human, latents, contexts, budget, prices)
    folder = atoms_folder(run, hook)
    home = recipe_beside(run)
    recipe = load_recipe(home, overrides)
    check_split(folder, recipe)
    out = Path(out) if out is not None else _default_out(home.parent, folder)
    if out.exists() and not out.is_dir():
        raise AtomLensError(f"out is {str(out)!r}, which is a file: a folder is needed")
    spending = Budget(1.0 if budget is None and any(prices) else budget, (prices[0], prices[1]))
    names = [] if model is None or dry_run else [model, *([second_model] if second_model else [])]
    judges = [Judge(name, base_url, out / "cache", spending) for name in names]

    atoms = load_atoms(folder)
    read = corpus(recipe, str(atoms.cfg.metadata.hook_name))
    found: dict[str, Any] = {
        "schema_version": 2,
        "model": recipe.model.name,
        "hook": atoms.cfg.metadata.hook_name,
        "seed": seed,
        "purity": label_purity(read, lambda labelled: read_kinds(atoms, recipe, labelled, (LEAST, LEAST), seed), seed),
        "judge": None,
        "versions": versions(),
    }
    cases: list[Case] = []
    if dry_run or judges:
        codes = read_kinds(atoms, recipe, read, (contexts, contexts // 2), seed, without=NOT_ASKED)
        held = read.heldout.numpy()
        cases, living = draw_cases(codes, held, latents, contexts, seed)
        if not any(case.kind == CONTROL for case in cases):
            raise AtomLensError(
                f"contexts is {contexts}, too many to draw random rows for comparison from {(~held).sum()} training "
                f"and {held.sum()} held-out rows: ask for fewer"
            )
        about = {"model": model, "second_model": second_model, "prompts": VERSION, "contexts": contexts}
        found["judge"] = {**about, "living": living}
    if dry_run:
        found["judge"]["estimate"] = estimate(cases, read, spending, 2 if second_model else 1)
        return found
    with locked(out):
        out.mkdir(parents=True, exist_ok=True)
        for place in (out, out / "cache"):
            sweep(place)
        if judges:
            spending.add_kept(out / "cache")
            found["judge"] |= ask_all(cases, read, judges, None if human is None else Path(human), out, seed)
        write_json(out / "judge.json", found)
    return found


def _check(
    model: str | None,
    second_model: str | None,
    human: str | Path | None,
    latents: int,
    contexts: int,
    budget: float | None,
    prices: Sequence[float],
) -> None:
    if latents < 1:
        raise AtomLensError(f"latents is {latents}, allowed is 1 or more")
    if not 2 <= contexts <= 100:
        raise AtomLensError(f"contexts is {contexts}, allowed is 2 to 100")
    for key, value in (("budget", budget), *(("prices", price) for price in prices)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise AtomLensError(f"{key} is {value}, allowed is 0 or more")
    if budget is not None and not any(prices):
        raise AtomLensError(
            f"budget is {budget}, but prices are 0 0: dollars per million tokens are needed to keep to it"
        )
    for key, value in (("second_model", second_model), ("human", human)):
        if value is not None and model is None:
            raise AtomLensError(f"{key} is {str(value)!r}, but no model is given to compare it with")
    if model is not None and model == second_model:
        raise AtomLensError(f"second_model is {second_model!r}, which is the judge itself: another one is needed")


def _default_out(home: Path, folder: Path) -> Path:
    """A folder for each dictionary of the run at `home`; a run with only one has the shortest name."""
    only = [folder] == [file.parent for file in home.glob(f"*/{SAE_CFG_FILENAME}")]
    return home / "judge" if only else home / "judge" / folder.relative_to(home)


def command(
    run: str,
    /,
    *overrides: str,
    hook: str | None = None,
    model: str | None = None,
    base_url: str | None = None,
    second_model: str | None = None,
    human: Path | None = None,
    latents: int = 50,
    contexts: int = 10,
    budget: float | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    dry_run: bool = False,
    out: Path | None = None,
) -> None:
    """Judge whether the contexts of each latent have something in common, by labels and by a language model.

    Example: atom-lens judge runs/cities-16k --model gpt-4o-mini --prices 0.15 0.6 --dry-run

    Args:
        run: run folder
        overrides: change a key of the run's recipe
        hook: which atoms, if the run has several hooks
        model: the judge, by its name on the server (default: none, measure purity only)
        base_url: of any OpenAI-compatible server (default: $OPENAI_BASE_URL)
        second_model: another judge, to measure the agreement of the two
        human: CSV of a person's scores, to measure the agreement with them
        latents: how many latents are drawn of each kind
        contexts: how many contexts of each latent are shown
        budget: dollars at most, with --prices (default: 1)
        prices: dollars per million tokens read and written (default: none, and no cap)
        seed: of draws and shuffles
        dry_run: show what would be asked and what it costs, ask nothing
        out: folder (default: judge/ in the run folder)
    """
    found = judge(
        run,
        hook=hook,
        overrides=overrides,
        model=model,
        base_url=base_url,
        second_model=second_model,
        human=human,
        latents=latents,
        contexts=contexts,
        budget=budget,
        prices=prices,
        seed=seed,
        dry_run=dry_run,
        out=out,
    )
    say(judge_table(found))
