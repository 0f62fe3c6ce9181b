"""report.json of a run: the report of each hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from atom_lens.errors import AtomLensError
from atom_lens.evidence.results import Report
from atom_lens.storage.files import shown, write_json
from atom_lens.storage.schema import Result


class RunReport(Result):
    """hook -> report; the file of a run of one hook holds only that report."""

    hooks: dict[str, Report]

    @override
    def write(self, path: Path) -> None:
        found = self.model_dump(mode="json")
        write_json(path, found if len(self.hooks) > 1 else next(iter(found["hooks"].values())))

    @classmethod
    @override
    def checked(cls, found: Any, path: Path) -> RunReport:
        hooks = found["hooks"] if "hooks" in found else {str(found.get("hook")): found}
        if not isinstance(hooks, dict) or not hooks:
            raise AtomLensError(
                f"{str(path)!r} is damaged: key hooks is {shown(hooks)}, allowed is a report for each hook"
            )
        return cls(hooks={hook: Report.checked(one, path) for hook, one in hooks.items()})
