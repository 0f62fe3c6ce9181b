"""The command line, ``atom-lens``: the `command` of every study and of sharing, imported when it is called."""

from __future__ import annotations

import ast
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter
from typing_extensions import override

from atom_lens._version import __version__
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import visible, without_secrets
from atom_lens.storage.terminal import QUIET, say

# What a command leaves behind when it is interrupted.
_LEAVES: dict[str, str] = {
    **dict.fromkeys(("train", "compare", "intervene", "judge", "scale"), "the same command resumes from what is kept"),
    # The Hub may have taken the commit even though its answer was lost.
    "publish": "the repository is at its old commit or at the new one, the same command completes it",
}


def commands() -> Iterator[tuple[str, str, str]]:
    """(name, module, first line of its help) of every module that has a `command`; none of them is imported."""
    here = Path(__file__).parent
    for file in sorted([*here.glob("studies/*.py"), *here.glob("studies/*/run.py"), *here.glob("sharing/*.py")]):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command"]
        assigned = [
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "command"
        ]
        if own or assigned:
            package = file.parent / "__init__.py" if file.name == "run.py" else file
            text = ast.get_docstring(own[0] if own else ast.parse(package.read_text(encoding="utf-8"))) or ""
            name = file.parent.name if file.name == "run.py" else file.stem
            module = ".".join(("atom_lens", *file.relative_to(here).with_suffix("").parts))
            yield name, module, text.splitlines()[0]


def app() -> App:
    """All commands."""
    made = App(
        name="atom-lens",
        help="Tells you whether a dictionary's latents are real units of a model, and finds better ones. Every command "
        "takes --quiet (no progress bars, no table) and --debug (show where an error comes from).",
        version=__version__,
        default_parameter=Parameter(negative=()),
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    for name, module, text in commands():
        made.command(f"{module}:command", name=name, help=text)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence about anything that a user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    meta = app()
    flags = {"--quiet": False, "--debug": False}
    for flag in flags:
        flags[flag] = flag in arguments
        arguments = [argument for argument in arguments if argument != flag]
    quiet = flags["--quiet"] or os.environ.get("RANK", "0") != "0"  # one of several processes speaks
    before = {name: os.environ.get(name) for name in (QUIET, "TQDM_DISABLE")}
    os.environ[QUIET] = "1" if quiet else ""
    # tqdm reads this when it is first imported, which no command does before this line.
    os.environ["TQDM_DISABLE"] = "1" if quiet or not sys.stderr.isatty() else ""
    _log(logging.WARNING if quiet else logging.INFO)
    name = arguments[0] if arguments else ""
    try:
        meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        say(f"atom-lens {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AtomLensError, OSError) as error:
        if flags["--debug"]:
            raise
        text = without_secrets(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            text = f"no disk space is left to write {error.filename or 'the output'}, free some or write elsewhere"
        say(f"atom-lens {name}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"atom-lens {name}: interrupted, {_LEAVES.get(name, 'nothing was written')}", file=sys.stderr)
        return 130
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            os.environ.update({} if value is None else {key: value})
    return 0


class _Formatter(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def _log(level: int) -> None:
    console = logging.StreamHandler()
    console.setLevel(level)
    console.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logging.getLogger("atom_lens").setLevel(logging.INFO)
