"""Run: a recipe in, a run folder out: harvest, split, metric, atoms, report."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from jaxtyping import Float
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from atom_lens.activations.harvest import Harvest
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.tsae.sae import model_metadata
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import observe
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.results import Report
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import dump_recipe, load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.recipe.split import harvest_for, split_activations
from atom_lens.storage.files import new_folder
from atom_lens.storage.schema import Result
from atom_lens.storage.sealed import LOG, sealed_folder, verify
from atom_lens.studies.study import Study, recipe_command, register
from atom_lens.studies.train.controls import fit_with_controls
from atom_lens.studies.train.folder import CHECKPOINT, checkpoint_file, run_folder, same_activations
from atom_lens.studies.train.result import RunReport
from atom_lens.studies.train.show import report_table, show
from atom_lens.tensors import parallel
from atom_lens.training.fit import encoder_seconds

logger = logging.getLogger(__name__)
IDENTITY_FILENAME = "identity.safetensors"
study = register(Study(name="train", file="report.json", result=RunReport, show=show))


def train(recipe: Recipe | str | Path, overrides: Sequence[str] = (), out: str | Path = "runs") -> Path:
    """Run a recipe; returns the run folder, which appears whole at the end or not at all.

    A run that was stopped goes on from its last checkpoint when it is called again, and ends with the same bits. Under
    `torchrun` the processes share it out: prompts, dictionaries, rows and pairs (`atom_lens.tensors.parallel`).

    Args:
        recipe: a `Recipe`, or the path of a YAML file.
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
        prompts = recipe.prompts.read()
        found = harvest_for(recipe, prompts)
        same_activations(work, found.views)
        with _logging_to(work / LOG) if parallel.rank() == 0 else nullcontext():
            logger.info(
                "harvest: %d prompts, %d hooks%s", len(prompts), len(found), ", from the store" * found.from_store
            )
            for hook in found:
                if parallel.agreed((work / hook).is_dir):
                    verify(work / hook)
                else:
                    _one_hook(recipe, prompts, found, hook, work)
                if parallel.rank() == 0:
                    for checkpoint in work.glob(f"{glob.escape(hook)}*{CHECKPOINT}"):
                        checkpoint.unlink()
        if parallel.rank() == 0:
            reports = {hook: Report.read(work / hook / "report.json") for hook in found}
            RunReport(hooks=reports).write(work / "report.json")
    return folder


def _one_hook(recipe: Recipe, prompts: Sequence[Prompt], found: Harvest, hook: str, work: Path) -> None:
    assert recipe.atoms is not None and recipe.training is not None
    split = split_activations(recipe, prompts, found, hook)
    x, heldout, subjects = split.x, split.heldout, split.subjects
    dropped = found.dropped[hook]
    logger.info(
        "%s: %d training and %d held-out activations, %d massive rows dropped", hook, len(x), len(heldout), dropped
    )
    start = time.monotonic()
    aip = AtomicInnerProduct.estimate(x, recipe.metric.ridge, source=f"{recipe.name}: {len(x)} training activations")
    estimated = time.monotonic()
    metadata = {
        "model_name": recipe.model.name,
        "hook_name": hook,
        "prepend_bos": found.prepend_bos,
        "context_size": int(found.rows[hook][:, 1].max()) + 1,  # of the longest prompt that was read
        **model_metadata(),
    }
    checkpoint = checkpoint_file(work, hook)
    resumed = checkpoint.exists()
    fitted = fit_with_controls(
        x,
        heldout,
        split.validation,
        aip,
        recipe.atoms,
        recipe.training,
        metadata,
        recipe.wandb,
        recipe.name,
        recipe.metric.ridge,
        checkpoint,
    )
    atoms = fitted.runs[0]
    trained = time.monotonic()
    took = f"{hook}: trained {fitted.trained} dictionaries in one pass in {trained - estimated:.0f} s"
    speed: dict[str, float] = {}
    if not resumed:  # the steps of a process that was stopped took time that nobody measured
        speed = _speed(recipe.training, recipe.atoms, x.shape[1], fitted.trained, trained - estimated)
        took += (
            f", {speed['train_rows_per_second']:,.0f} activations/s, {speed['train_share_of_floor']:.0%} of the floor"
        )
    logger.info(took)
    report = evaluate(
        atoms,
        x,
        heldout,
        groups=subjects,
        trained_nulls=fitted.nulls,
        seed=recipe.training.seed,
        about={
            "name": recipe.name,
            "model": recipe.model.name,
            "hook": hook,
            "positions": recipe.positions,
            "massive_rows_dropped": dropped,
            "seconds": {"harvest": found.seconds, "metric": estimated - start, "train": trained - estimated, **speed},
        },
    )
    found_l0, wanted = report.train.l0.mean, recipe.atoms.target_l0
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
    logger.debug("%s:\n%s", hook, report_table(report).text())
    if parallel.rank() > 0:
        return
    with new_folder(work / hook) as temporary:
        save_atoms(atoms, temporary, report, fitted.sparsity[0], *scores[:1])
        for seed, run in enumerate(fitted.runs[1:], start=1):
            save_atoms(run, temporary / f"seed-{seed}", None, fitted.sparsity[seed], scores[seed])


def _speed(training: Training, atoms: Atoms, width: int, dictionaries: int, seconds: float) -> dict[str, float]:
    """Activations a second, of all dictionaries together, and that as a share of what the encoder's product allows."""
    floor = encoder_seconds(width, atoms, training) * training.steps * dictionaries / parallel.size()
    rows = training.steps * training.batch_size * dictionaries
    return {"train_rows_per_second": rows / seconds, "train_share_of_floor": floor / seconds}


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """What this package logs, with times, in a file of the run folder."""
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
    sparsity: Float[Tensor, " F"],
    identity_scores: Float[Tensor, " F"] | None = None,
) -> None:
    """An atoms folder: sae-lens' files, the metric, the report, and of every atom how well other runs agree on it."""
    with sealed_folder(folder) as temporary:
        atoms.write_files(temporary)
        save_file({"sparsity": sparsity.float().cpu().contiguous()}, temporary / SPARSITY_FILENAME)
        if identity_scores is not None:
            save_file({"identity": identity_scores.float().cpu().contiguous()}, temporary / IDENTITY_FILENAME)
        if report is not None:
            report.write(temporary / "report.json")


command = recipe_command(study, train, "atom-lens train recipes/quickstart.yaml")
