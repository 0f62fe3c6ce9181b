"""The command line, ``atom-lens``: one function per command, which imports what it needs when it is called."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

from typing_extensions import override

from atom_lens._version import __version__
from atom_lens.storage.files import check_writable, visible, without_secrets


def parser() -> argparse.ArgumentParser:
    """The arguments of ``atom-lens``."""
    main_parser = argparse.ArgumentParser(
        prog="atom-lens",
        description="Atoms of language models, and the evidence that says what they are worth.",
    )
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.register("action", None, _Once)
        made.add_argument("--quiet", action="store_true", help="no progress bars, no table")
        made.add_argument("--debug", action="store_true", help="show where an error comes from")
        return made

    overriding = "change a key of the recipe, e.g. atoms.target_l0=4 model.device=cuda"
    train = command("train", "Harvest, train atoms, measure them against nulls; writes OUT/<name>/.")
    train.add_argument("recipe", help="YAML file, see recipes/")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    train.add_argument("--out", default="runs", help="folder of run folders (default: runs)")

    evaluate = command("evaluate", "Measure atoms, or any sae-lens SAE, on the activations of a recipe.")
    evaluate.add_argument("atoms", help="run folder, atoms folder, or any sae-lens SAE folder")
    evaluate.add_argument("--recipe", help="whose activations (default: the run's own recipe.yaml)")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    evaluate.add_argument("--hook", help="which atoms, where the run has several hooks")
    evaluate.add_argument("--json", type=Path, help="also write the report to this file")

    compare = command("compare", "Neurons, stock SAEs, pretrained features and our atoms side by side; resumes.")
    compare.add_argument("recipe", help="YAML file, see recipes/")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    compare.add_argument("--out", default="runs", help="folder of run folders (default: runs)")

    scale = command("scale", "The n x F grid: what is learned, what memorised, and a law for the capacity; resumes.")
    scale.add_argument("recipe", help="YAML file, see recipes/capacity.yaml")
    scale.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    scale.add_argument("--out", default="runs", help="folder of run folders (default: runs)")

    causal = command("intervene", "Edit codes in the live model: do answers change as they should? Resumes.")
    causal.add_argument("recipe", help="YAML file, see recipes/intervene.yaml")
    causal.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    causal.add_argument("--out", default="runs", help="folder of run folders (default: runs)")

    planted = command("planted", "Planted atoms: the theorem, its limits, and trained SAEs against the truth.")
    planted.add_argument("recipe", help="YAML file, see recipes/planted.yaml")
    planted.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    planted.add_argument("--json", type=Path, help="also write the figures to this file")

    page = command("report", "One HTML file about runs and studies: figures, tables, an atoms browser; no network.")
    page.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train, folders of compare, scale, ...")
    page.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    page.add_argument("--out", type=Path, help="the file (default: report.html in the first folder's parent)")

    judge = command("judge", "Do an atom's contexts have something in common? A language model, and labels, say.")
    judge.add_argument("run", help="run folder")
    judge.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    judge.add_argument("--hook", help="which atoms, where the run has several hooks")
    judge.add_argument("--model", help="of the judge, as its server names it; none: only what needs no judge")
    judge.add_argument("--base-url", help="of any OpenAI-compatible server (default: $OPENAI_BASE_URL)")
    judge.add_argument("--second-model", help="another judge, for the agreement between the two")
    judge.add_argument("--human", type=Path, help="CSV of a person's scores, for the agreement with them")
    judge.add_argument("--units", type=int, default=50, help="units drawn of each kind (default: 50)")
    judge.add_argument("--contexts", type=int, default=10, help="contexts shown of each unit (default: 10)")
    judge.add_argument("--budget", type=float, help="dollars at most, with --prices (default: 1)")
    judge.add_argument(
        "--prices",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("IN", "OUT"),
        help="dollars per million tokens read and written (default: none, and no cap)",
    )
    judge.add_argument("--seed", type=int, default=0, help="of what is drawn and how it is shuffled")
    judge.add_argument("--dry-run", action="store_true", help="say what would be asked and what it costs, ask nothing")
    judge.add_argument("--out", type=Path, help="folder (default: judge/ in the run folder)")

    share = command("publish", "Publish a run on the Hugging Face Hub: atoms, evidence and a card, in one commit.")
    share.add_argument("run", help="run folder")
    share.add_argument("repo", help="user/name, created where it does not exist")
    share.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    share.add_argument(
        *("--layer", "--hook"),
        dest="hooks",
        action="append",
        default=[],
        help="layer number, name or glob of a hook; repeat (default: all)",
    )
    share.add_argument("--license", help="of the atoms, as the Hub abbreviates it, e.g. mit")
    share.add_argument("--private", action="store_true", help="for a repository that is created now")
    share.add_argument("--dry-run", action="store_true", help="say what would be published, change nothing")

    change = command("convert", "Write atoms, or a dictionary of another library, as an sae-lens folder.")
    change.add_argument("source", help="folder, file or user/name of ours or another library")
    change.add_argument("out", help="the new folder")
    change.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    change.add_argument("--hook", help="which dictionary, where there are several: a name, a glob or a layer")
    change.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16 (default: theirs)")
    change.add_argument("--threshold", default="auto", choices=["auto", "plain", "log"], help="of bare weights")

    shift = command("shift", "Angles between activations: Euclidean, and under metrics from the same and other text.")
    shift.add_argument("recipe", help="YAML file, see recipes/")
    shift.add_argument("overrides", nargs="*", metavar="section.key=value", help=overriding)
    shift.add_argument("--json", type=Path, help="also write the figures to this file")
    shift.add_argument("--plot", type=Path, help="also draw the matrix of domains and metrics, as PNG")
    return main_parser


class _Once(argparse.Action):
    """What `store` does, but not twice: the first value would be dropped without a word."""

    given = False

    @override
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.given and option_string:
            parser.error(f"argument {option_string}: given twice")
        self.given = True
        setattr(namespace, self.dest, values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence on anything a user can mend."""
    command_line = parser()
    arguments, others = command_line.parse_known_args(argv)
    # argparse takes positionals in one run only; overrides may also stand behind options.
    misplaced = [text for text in others if text.startswith("-") or "=" not in text]
    if misplaced:
        command_line.error(f"unrecognized arguments: {' '.join(misplaced)}")
    arguments.overrides += others
    arguments.quiet |= os.environ.get("RANK", "0") != "0"  # one of several processes speaks
    _quiet_bars(disable=True if arguments.quiet else None)
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    console.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logging.getLogger("atom_lens").setLevel(logging.INFO)
    try:
        for name in ("json", "plot"):
            if path := getattr(arguments, name, None):
                check_writable(f"--{name}", path)
        _COMMANDS[arguments.command](arguments)
    except BrokenPipeError:  # who reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        text = without_secrets(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            text = f"no disk space is left to write {error.filename or 'the output'}, free some or write elsewhere"
        _say(f"atom-lens {arguments.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = arguments.command in ("train", "compare", "intervene", "judge", "scale")
        after = "the same command goes on from what is kept, if anything was yet" if goes_on else "nothing was written"
        if arguments.command == "publish":  # the Hub may have taken the commit, and only its answer was missed
            after = "the repository is at its old commit or at the new one, the same command completes it"
        _say(f"atom-lens {arguments.command}: interrupted, {after}", file=sys.stderr)
        return 130
    return 0


def _say(text: str, file: Any = None) -> None:
    """Print without what a terminal would obey: names and texts come from recipes, models, prompts and the Hub."""
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"  # a terminal may have no R², or no Chinese
    print(visible(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding), file=file)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def _quiet_bars(disable: bool | None) -> None:
    """Progress bars of every library here; None silences them where there is no terminal."""
    from tqdm.std import tqdm

    tqdm.__init__ = partialmethod(tqdm.__init__, disable=disable)  # type: ignore[method-assign]


def _train(arguments: argparse.Namespace) -> None:
    from atom_lens.studies.report_text import certificates_text, reading, table
    from atom_lens.studies.train import train

    folder = train(arguments.recipe, arguments.overrides, arguments.out)
    if arguments.quiet:
        return
    report = json.loads((folder / "report.json").read_text())
    for hook, one in report.get("hooks", {report.get("hook"): report}).items():
        _say(f"\n{hook} of {one['model']}\n\n{table(one)}\n\n{certificates_text(one)}\n\n{reading(one)}")
    _say(f"\nwritten to {folder}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from atom_lens.storage.files import write_json
    from atom_lens.studies.evaluate import evaluate_folder, recipe_beside
    from atom_lens.studies.report_text import certificates_text, reading, table

    recipe = arguments.recipe or recipe_beside(arguments.atoms)
    report = evaluate_folder(arguments.atoms, recipe, arguments.overrides, arguments.hook)
    if arguments.json:
        write_json(arguments.json, report)
    if not arguments.quiet:
        _say(
            f"{report['hook']} of {report['model']}\n\n{table(report)}\n\n"
            f"{certificates_text(report)}\n\n{reading(report)}"
        )


def _shift(arguments: argparse.Namespace) -> None:
    from atom_lens.recipe.reading import load_recipe
    from atom_lens.studies.shift import draw_shift, shift, shift_table

    found = shift(load_recipe(arguments.recipe, arguments.overrides))
    if arguments.plot:
        draw_shift(found, arguments.plot)
    _show(arguments, found, shift_table)


def _show(arguments: argparse.Namespace, found: dict[str, Any], as_table: Callable[[dict[str, Any]], str]) -> None:
    from atom_lens.storage.files import write_json

    if arguments.json:
        write_json(arguments.json, found)
    if not arguments.quiet:
        _say(as_table(found))


def _compare(arguments: argparse.Namespace) -> None:
    from atom_lens.recipe.reading import load_recipe
    from atom_lens.studies.compare import compare
    from atom_lens.studies.frontier import comparison_table, verdict
    from atom_lens.studies.layers import layers_table
    from atom_lens.studies.matched import matched_table

    folder = compare(load_recipe(arguments.recipe, arguments.overrides), arguments.out)
    if arguments.quiet:
        return
    result = json.loads((folder / "compare.json").read_text())
    for hook, found in result["hooks"].items():
        head = f"{hook}, n = {found['n']}, F = {found['d_sae']}, n / F = {found['n_over_f']:.1f}"
        _say(f"\n{head}\n\n{comparison_table(found)}\n\n{verdict(found)}")
        if found["matched"]:
            _say(f"\n{matched_table(found['matched'])}")
    if len(result["hooks"]) > 1:
        _say(f"\n{layers_table(result)}")
    _say(f"\nwritten to {folder}")


def _scale(arguments: argparse.Namespace) -> None:
    from atom_lens.recipe.reading import load_recipe
    from atom_lens.studies.scale import scale, scale_table

    folder = scale(load_recipe(arguments.recipe, arguments.overrides), arguments.out)
    if not arguments.quiet:
        _say(f"\n{scale_table(json.loads((folder / 'scale.json').read_text()))}\n\nwritten to {folder}")


def _report(arguments: argparse.Namespace) -> None:
    from atom_lens.studies.page.write import write_page

    _no_overrides(arguments, "run folders")
    _say(f"written to {write_page(arguments.runs, arguments.out)}")


def _judge(arguments: argparse.Namespace) -> None:
    from atom_lens.studies.judge.study import judge
    from atom_lens.studies.judge.tables import judge_table

    names = ("hook", "model", "base_url", "second_model", "human", "units", "contexts")
    names += ("budget", "prices", "seed", "dry_run", "out")
    found = judge(arguments.run, overrides=arguments.overrides, **{name: getattr(arguments, name) for name in names})
    if not arguments.quiet:
        _say(judge_table(found))


def _intervene(arguments: argparse.Namespace) -> None:
    from atom_lens.recipe.reading import load_recipe
    from atom_lens.studies.intervene import intervene
    from atom_lens.studies.intervene_figures import intervene_table

    folder = intervene(load_recipe(arguments.recipe, arguments.overrides), arguments.out)
    if not arguments.quiet:
        _say(f"\n{intervene_table(json.loads((folder / 'intervene.json').read_text()))}\n\nwritten to {folder}")


def _planted(arguments: argparse.Namespace) -> None:
    from atom_lens.studies.planted import load_planted, planted, planted_table

    _show(arguments, planted(load_planted(arguments.recipe, arguments.overrides)), planted_table)


def _convert(arguments: argparse.Namespace) -> None:
    from atom_lens.sharing.convert import convert
    from atom_lens.storage.files import read_json

    _no_overrides(arguments, "a source and a new folder")
    out = convert(
        arguments.source, arguments.out, hook=arguments.hook, dtype=arguments.dtype, threshold=arguments.threshold
    )
    if not arguments.quiet:
        cfg = read_json(out / "cfg.json")
        _say(f"{cfg['architecture']}, {cfg['d_sae']} x {cfg['d_in']}, {cfg['dtype']}: written to {out}")


def _no_overrides(arguments: argparse.Namespace, takes: str) -> None:
    if arguments.overrides:
        raise ValueError(f"unrecognized argument {arguments.overrides[0]!r}, {arguments.command} takes {takes}")


def _publish(arguments: argparse.Namespace) -> None:
    from atom_lens.sharing.publish import publish

    _no_overrides(arguments, "a run folder and user/name")
    found = publish(
        arguments.run,
        arguments.repo,
        hooks=arguments.hooks,
        private=arguments.private,
        license=arguments.license,
        dry_run=arguments.dry_run,
    )
    if arguments.dry_run or not arguments.quiet:
        for name, size in found.files.items():
            _say(f"{size:>12,}  {name}")
        total = sum(found.files.values())
        _say(f"{total:>12,}  bytes in {len(found.files)} files, and README.md{'' if found.url else ':'}")
        _say(f"published: {found.url}" if found.url else f"\n{found.card}\nnothing was published (dry run)")


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "convert": _convert,
    "intervene": _intervene,
    "judge": _judge,
    "planted": _planted,
    "publish": _publish,
    "report": _report,
    "scale": _scale,
    "shift": _shift,
}
