"""The plan of the house: folders in the order of import, each with its sentence; nothing is imported from above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "atom_lens"
# Each imports only what stands before it.
ORDER = [
    "_version",
    "errors",
    "discover",
    "tensors",
    "storage",
    "geometry",
    "activations",
    "recipe",
    "dictionaries",
    "training",
]
ORDER += ["evidence", "interventions", "views", "studies", "sharing", "cli", "__main__"]


def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] == "atom_lens"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_imported_from_above(file: Path) -> None:
    here = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":  # the face imports all
        return
    above = set(ORDER[ORDER.index(here) + 1 :])
    wrong = {name for name in imported(file) if len(name.split(".")) > 1 and name.split(".")[1] in above}
    assert not wrong, f"{file.relative_to(PACKAGE)} imports {wrong}, which stand above {here}"


def test_every_folder_says_what_it_is() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    for folder in folders:
        sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert sentence and sentence.splitlines()[0].endswith("."), folder
    top = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert top - {"__init__", "py"} == set(ORDER), "CONTRIBUTING.md and ORDER name every part"


def test_no_face_hides_a_module() -> None:
    """`from atom_lens.x import y` is the module y, or the one thing of that name, never either."""
    for face in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(face.read_text(encoding="utf-8"))
        names = {one.asname or one.name for node in tree.body if isinstance(node, ast.ImportFrom) for one in node.names}
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        beside = {path.stem for path in face.parent.iterdir()} - {"__init__"}
        modules_asked_for = {
            one.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            and node.module == ".".join(face.parent.relative_to(PACKAGE.parent).parts)
            for one in node.names
        }
        assert not (names & beside) - modules_asked_for, face


def test_files_are_short() -> None:
    for file in PACKAGE.rglob("*.py"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= 352, f"{file.relative_to(PACKAGE)} has {lines} lines"
