"""Run a recipe: harvest, split, metric, atoms, report; the result is a run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import wandb
from jaxtyping import Float
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from atom_lens.activations.harvest import Harvest
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.stream import Stream
from atom_lens.dictionaries.aip_topk import AIPTopK
from atom_lens.dictionaries.folder import ALSO, DISTILLED, SEED
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.dictionaries.tsae.sae import model_metadata
from atom_lens.evidence.bootstrap import intervals
from atom_lens.evidence.evaluator import AtomEvaluator
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import observe
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.results import Another, Distilled, Report
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import dump_recipe, load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.running import model_of, stream_of
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.recipe.split import SplitActivations, harvest_for, prompts_of, split_activations
from atom_lens.storage.files import new_folder
from atom_lens.storage.schema import Result
from atom_lens.storage.sealed import LOG, sealed_folder, verify
from atom_lens.studies.study import Study, recipe_command, register
from atom_lens.studies.train.controls import Fitted, Plan, plan, shuffled_name
from atom_lens.studies.train.folder import CHECKPOINT, checkpoint_file, run_folder, same_activations
from atom_lens.studies.train.result import RunReport
from atom_lens.studies.train.show import report_table, show
from atom_lens.tensors import parallel
from atom_lens.training.distil import distil
from atom_lens.training.fit import encoder_seconds, fit_together, wandb_run
from atom_lens.training.mixing import Mixing

logger = logging.getLogger(__name__)
IDENTITY_FILENAME = "identity.safetensors"
_WATCHED = 2048  # rows measured while dictionaries train
study = register(Study(name="train", file="report.json", result=RunReport, show=show))


def train(recipe: Recipe | str | Path, overrides: Sequence[str] = (), out: str | Path = "runs") -> Path:
    """Run a recipe; returns the run folder, which appears whole at the end or not at all.

    A stopped run resumes from its last checkpoint when it is called again, and ends with the same bits. Under
    `torchrun` the processes divide prompts, dictionaries, rows and pairs (`atom_lens.tensors.parallel`).

    Args:
        recipe: a `Recipe`, the path of a YAML file, or the name of a recipe of the package.
        overrides: ``section.key=value``, applied to a recipe that is read from a file.
        out: where run folders are kept; this one is ``out/<name>``.

    Raises:
        AtomLensError: anything wrong with the recipe, the model, the prompts or the activations.
        FileExistsError: the run folder exists and is not empty.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = Path(out) / recipe.name
    recipe.to_train("train")
    with parallel.processes(), run_folder(folder, dump_recipe(recipe)) as work:
        prompts = prompts_of(recipe)
        # Only a stream needs the model after the harvest; otherwise the memory is for the training.
        opened = None if recipe.stream is None else model_of(recipe)
        found = harvest_for(recipe, prompts, opened)
        same_activations(work, found.views)
        with _logging_to(work / LOG) if parallel.rank() == 0 else nullcontext():
            logger.info(
                "harvest: %d prompts, %d hooks%s", len(prompts), len(found), ", from the store" * found.from_store
            )
            todo = []
            for hook in found:
                if parallel.agreed((work / hook).is_dir):
                    verify(work / hook)
                else:
                    todo.append(hook)
            # A model that runs during training serves all hooks at once, including finished ones: the checkpoint covers
            # all of them.
            stream = stream_of(recipe, prompts, found, opened) if opened and todo else None
            for hooks in [list(found)] if stream else [[hook] for hook in todo]:
                _train(recipe, prompts, found, stream, hooks, todo, work)
                _forget_checkpoints(work)
            _forget_checkpoints(work)  # those of a process that was killed right after keeping its last hook
        if parallel.rank() == 0:
            reports = {hook: Report.read(work / hook / "report.json") for hook in found}
            RunReport(hooks=reports).write(work / "report.json")
    return folder


def _forget_checkpoints(work: Path) -> None:
    for checkpoint in work.glob(f"*{CHECKPOINT}") if parallel.rank() == 0 else ():
        checkpoint.unlink()


class _Hook(NamedTuple):
    """A hook whose dictionaries are trained: its activations, the plan, and the seconds that its metric took."""

    split: SplitActivations
    plan: Plan
    seconds: float


def _train(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    found: Harvest,
    stream: Stream | None,
    hooks: Sequence[str],
    todo: Sequence[str],
    work: Path,
) -> None:
    """Train the dictionaries of some hooks in one pass; measure and keep those of the hooks `todo`, one by one."""
    atoms, training = recipe.to_train("train")
    planned = {hook: _planned(recipe, prompts, found, hook) for hook in hooks}
    checkpoint = checkpoint_file(work, "stream" if stream else hooks[0])
    resumed = checkpoint.exists()
    start = time.monotonic()
    learners = {
        f"{hook} {name}" if stream else name: learner
        for hook, one in planned.items()
        for name, learner in one.plan.learners.items()
    }
    batches = _mixing(recipe, stream, hooks) if stream else planned[hooks[0]].plan.streams
    with wandb_run(recipe.wandb if parallel.rank() == 0 else None, recipe.name) as logs:
        # Several processes measure together, so each would have to reach the same steps.
        evaluator = _evaluator(planned, recipe).several if logs.log_to_wandb and parallel.size() == 1 else None
        sparsity = fit_together(batches, learners, training, logs, checkpoint, evaluator)
        seconds = time.monotonic() - start
        took = f"{', '.join(hooks)}: trained {len(learners)} dictionaries in one pass in {seconds:.0f} s"
        speed: dict[str, float] = {}
        if not resumed:  # nobody measured how long the steps before a stop took
            width = planned[hooks[0]].plan.aip.width
            speed = _speed(training, atoms, width, len(learners), seconds)
            share = f"{speed['train_share_of_floor']:.0%} of the floor"
            took += f", {speed['train_rows_per_second']:,.0f} activations/s, {share}"
        logger.info(took)
        for hook, one in ((hook, planned[hook]) for hook in hooks if hook in todo):
            named = {name: sparsity[f"{hook} {name}" if stream else name] for name in one.plan.learners}
            timing = {"harvest": found.seconds, "metric": one.seconds, "train": seconds, **speed}
            report = _keep(recipe, found, hook, one, one.plan.finished(named), timing, work)
            if logs.log_to_wandb and wandb.run is not None:
                wandb.run.summary.update({"report": {hook: report.model_dump(mode="json")}})


def _evaluator(planned: Mapping[str, _Hook], recipe: Recipe) -> AtomEvaluator:
    """Measures while dictionaries train, on rows that none of them is trained on."""
    named = {hook if recipe.stream else "x": one for hook, one in planned.items()}
    rows = {}
    for name, one in named.items():
        aside = one.split.heldout if one.split.validation is None else one.split.validation
        rows[name] = aside.select(torch.arange(min(_WATCHED, len(aside))))
    return AtomEvaluator(rows, {name: one.plan.aip for name, one in named.items()})


def _mixing(recipe: Recipe, stream: Stream, hooks: Sequence[str]) -> Mixing:
    _, training = recipe.to_train("train")
    assert recipe.stream is not None
    shuffled = {shuffled_name(hook): hook for hook in hooks if training.nulls}
    rows = training.steps * training.batch_size
    return Mixing(stream, training.batch_size, recipe.stream.buffer_size, training.seed, shuffled, rows)


def _planned(recipe: Recipe, prompts: Sequence[Prompt], found: Harvest, hook: str) -> _Hook:
    atoms, training = recipe.to_train("train")
    split = split_activations(recipe, prompts, found, hook)
    x, dropped = split.x, found.dropped[hook]
    logger.info(
        "%s: %d training and %d held-out activations, %d massive rows dropped",
        hook,
        len(x),
        len(split.heldout),
        dropped,
    )
    start = time.monotonic()
    aip = AtomicInnerProduct.estimate(x, recipe.metric.ridge, source=f"{recipe.name}: {len(x)} training activations")
    seconds = time.monotonic() - start
    metadata = {
        "model_name": recipe.model.name,
        "hook_name": hook,
        "prepend_bos": found.prepend_bos,
        "context_size": int(found.rows[hook][:, 1].max()) + 1,  # of the longest prompt that was read
        **model_metadata(),
    }
    stream = "x" if recipe.stream is None else hook
    return _Hook(split, plan(split, aip, atoms, training, metadata, recipe.metric.ridge, stream), seconds)


def _keep(
    recipe: Recipe, found: Harvest, hook: str, one: _Hook, fitted: Fitted, seconds: dict[str, float], work: Path
) -> Report:
    """Measure what was trained at a hook, and write its folder."""
    asked, training = recipe.to_train("train")
    x, aip, atoms = one.split.x, one.plan.aip, fitted.runs[0]
    report = evaluate(
        atoms,
        x,
        one.split.heldout,
        groups=one.split.subjects,
        trained_nulls=fitted.nulls,
        seed=training.seed,
        about={
            "name": recipe.name,
            "kind": one.plan.kind.name,
            "model": recipe.model.name,
            "hook": hook,
            "positions": recipe.positions,
            "massive_rows_dropped": found.dropped[hook],
            "seconds": seconds,
        },
    )
    found_l0, wanted = report.train.l0.mean, asked.target_l0
    if abs(found_l0 - wanted) > 0.25 * wanted:
        why = ", the activations need no more" if found_l0 < wanted and report.train.r2_aip > 0.9 else ""
        logger.warning("%s: L0 is %.2f on the training activations, %.2f was asked for%s", hook, found_l0, wanted, why)
    scores: list[Float[Tensor, " F"]] = []
    if len(fitted.runs) > 1:
        alive = [observe(run, x, aip).alive for run in fitted.runs]
        same = identity([run.W_dec.detach() for run in fitted.runs], aip, alive)
        figures = same.figures.model_copy(update={"pw_mcc_start": fitted.start_pw_mcc})
        report = report.model_copy(update={"identity": figures})
        scores = same.scores
    small = None
    if isinstance(atoms, PursuitSAE) and asked.pursuit.distilled:
        small = distil(atoms, x, training)
        report = report.model_copy(update={"distilled": _distilled(atoms, small, one.split, aip)})
    report = report.model_copy(
        update={"also": {name: _other(run, one.split, aip) for name, run in fitted.also.items()}}
    )
    logger.debug("%s:\n%s", hook, report_table(report).text())
    if parallel.rank() == 0:
        with new_folder(work / hook) as temporary:
            save_atoms(atoms, temporary, report, fitted.sparsity[0], *scores[:1])
            for seed, run in enumerate(fitted.runs[1:], start=1):
                save_atoms(run, temporary / f"{SEED}{seed}", None, fitted.sparsity[seed], scores[seed])
            if small is not None:
                save_atoms(small, temporary / DISTILLED, None, None)
            for name, run in fitted.also.items():
                save_atoms(run, temporary / f"{ALSO}{name}", None, None)
    return report


def _other(atoms: Metered, split: SplitActivations, aip: AtomicInnerProduct) -> Another:
    seen = observe(atoms, split.heldout, aip)
    interval = {"interval": intervals(seen, groups=split.subjects)}
    return Another(train=observe(atoms, split.x, aip).figures, heldout=seen.figures.model_copy(update=interval))


@torch.no_grad()
def _distilled(atoms: PursuitSAE, small: AIPTopK, split: SplitActivations, aip: AtomicInnerProduct) -> Distilled:
    """What a distilled dictionary is worth, and how many of the pursuit's atoms it finds."""
    rows = split.heldout[torch.arange(min(_WATCHED, len(split.heldout)))].to(atoms.W_dec)
    found, again = atoms.encode(rows) != 0, small.encode(rows) != 0
    shared = (found & again).sum(dim=1).double() / found.sum(dim=1).clamp(min=1)
    return Distilled(
        k=small.cfg.k,
        train=observe(small, split.x, aip).figures,
        heldout=observe(small, split.heldout, aip).figures,
        shared_atoms=float(shared[found.any(dim=1)].mean()),
    )


def _speed(training: Training, atoms: Atoms, width: int, dictionaries: int, seconds: float) -> dict[str, float]:
    """Activations per second of all dictionaries together, and as a share of what the encoder's product allows."""
    floor = encoder_seconds(width, atoms, training) * training.steps * dictionaries / parallel.size()
    rows = training.steps * training.batch_size * dictionaries
    return {"train_rows_per_second": rows / seconds, "train_share_of_floor": floor / seconds}


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Write what this package logs, with times, to a file of the run folder."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger("atom_lens")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def save_atoms(
    atoms: Metered,
    folder: Path,
    report: Result | None,
    sparsity: Float[Tensor, " F"] | None,
    identity_scores: Float[Tensor, " F"] | None = None,
) -> None:
    """Write an atoms folder: sae-lens' files, the metric, the report, and how well other runs agree on each atom."""
    with sealed_folder(folder) as temporary:
        atoms.write_files(temporary)
        if sparsity is not None:
            save_file({"sparsity": sparsity.float().cpu().contiguous()}, temporary / SPARSITY_FILENAME)
        if identity_scores is not None:
            save_file({"identity": identity_scores.float().cpu().contiguous()}, temporary / IDENTITY_FILENAME)
        if report is not None:
            report.write(temporary / "report.json")


command = recipe_command(study, train, "atom-lens train quickstart")
