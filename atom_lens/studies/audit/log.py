"""An audit on Weights & Biases: its numbers in the run's summary, its tables, and its page."""

from __future__ import annotations

from pathlib import Path

import wandb

from atom_lens.errors import AtomLensError
from atom_lens.studies.audit.result import Audit
from atom_lens.studies.audit.show import show


def log_audit(result: Audit, project: str, page: Path | None = None) -> None:
    """Log an audit as a run of a project; `WANDB_MODE` and the rest of the environment decide where.

    Args:
        result: the audit.
        project: name of the project.
        page: its HTML page, if there is one.

    Raises:
        AtomLensError: the run did not start.
    """
    about = {"model": result.model, "hook": result.hook, "text": result.text}
    try:
        run = wandb.init(project=project, job_type="audit", config=about)
    except wandb.Error as error:
        raise AtomLensError(f"--wandb is {project!r} and Weights & Biases did not start: {error}") from error
    with run:
        run.summary.update({"audit": result.model_dump(mode="json")})
        tables = [table for part in show(result, project) for table in part.tables]
        for number, table in enumerate(tables):
            columns, *rows = table.grid()
            shown = wandb.Table(columns=list(columns))
            for row in rows:
                shown.add_data(*row)
            run.log({f"table-{number}": shown, f"title-{number}": table.title})  # keys become file names, so no titles
        if page is not None:
            run.log({"page": wandb.Html(str(page))})
