"""The sections of a page: figures, tables and browsers under a heading, each only where there is data for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atom_lens.studies.page import study_tables, tables
from atom_lens.studies.page.charts import Panel
from atom_lens.studies.page.folders import Folder
from atom_lens.studies.page.opened import Opened, open_hooks
from atom_lens.studies.page.study_charts import ablations, cliff, doses, flips, law
from atom_lens.studies.page.unit_charts import Unit, by_layer, layers, plane, units_of

_NORMS = {"r2": "R²", "r2_aip": "R² (AIP)"}


@dataclass(frozen=True)
class Section:
    """A part of the page: its id, what the navigation and the heading call it, and what is in it."""

    id: str
    short: str
    title: str
    intro: str = ""
    panels: Sequence[Panel] = ()
    tables: Sequence[tables.Table] = ()
    browsers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> list[str]:
        """What the reader chooses from, where there is more than one."""
        return list(dict.fromkeys(name for panel in self.panels for name in panel.figures))


def sections_of(folders: Sequence[Folder]) -> list[Section]:
    """All sections that there is data for, in the order in which evidence is read."""
    found = [one for folder in folders for one in open_hooks(folder)]
    opened = [one for one in found if isinstance(one, Opened)]
    missing = " ".join(one for one in found if isinstance(one, str))
    sections = [_headline(folders, missing), *_geometry(opened), *_units(folders), *_scale(folders)]
    if opened:
        sections.append(
            Section(
                "atoms",
                "Atoms",
                "Atoms",
                "Every atom, with the contexts it fires on hardest: four of the training split, four held-out.",
                browsers={one.label: one.atoms for one in opened},
            )
        )
    sections += _interventions(folders)
    return [one for one in sections if one.panels or one.tables or one.browsers or one.intro]


def _headline(folders: Sequence[Folder], missing: str) -> Section:
    found = [tables.headline(folder, hook) for folder in folders for hook in folder.reports]
    for folder in folders:
        hooks = folder.studies.get("compare", {}).get("hooks", {})
        found += [study_tables.over_hooks(folder)] if len(hooks) > 1 else []
        for hook in hooks:
            found.append(study_tables.units(folder, hook))
            found += [study_tables.matched(folder, hook)] if hooks[hook].get("matched") else []
    intro = "Held-out activations are of subjects that no training saw."
    if any(folder.reports for folder in folders):
        intro += (
            " Small print below a held-out figure of the atoms is its 95% interval over subjects; below that of a "
            "null, the interval of the atoms' lead over it on the same subjects."
        )
    return Section("figures", "Figures", "Figures and nulls", f"{intro if found else ''} {missing}".strip(), (), found)


def _geometry(opened: Sequence[Opened]) -> list[Section]:
    if not opened:
        return []
    angles = Panel(
        "Angles between activations",
        "All pairs of up to 5,000 activations of a split; the metric was estimated on train alone, and has done its "
        "work where its curves centre on 90°.",
        {one.label: one.angles for one in opened},
    )
    coherences = Panel(
        "Coherence of atoms",
        "Atoms that fire on held-out activations, in pairs, beside as many random directions; a code of K atoms is "
        "provably unique if all coherences lie left of its line, 1/(2K − 1), K being of the held-out codes.",
        {one.label: one.coherences for one in opened if one.coherences is not None},
    )
    return [Section("geometry", "Geometry", "Geometry", panels=[angles, coherences])]


def _units(folders: Sequence[Folder]) -> list[Section]:
    hooks: dict[str, list[Unit]] = {}
    curves = {}
    compared = Counter(
        (folder.model, hook) for folder in folders for hook in folder.studies.get("compare", {}).get("hooks", {})
    )
    for number, folder in enumerate(folders):
        for hook, unit in units_of(folder, number if len(folders) > 1 else None):
            # Comparisons draw their units alike: two of one hook would be one cloud.
            alone = compared[folder.model, hook] < 2 or "compare" not in folder.studies
            hooks.setdefault(f"{'' if alone else folder.name + ', '}{hook} of {folder.model}", []).append(unit)
        curves |= by_layer(folder)
    sections = []
    if hooks:
        panels = [
            Panel(
                f"{label} against stability q*",
                "Filled marks are held-out, hollow ones train; up and to the right is better, and q* alone can be had "
                "with few active atoms.",
                {hook: plane(units, key, label) for hook, units in hooks.items()},
            )
            for key, label in _NORMS.items()
        ]
        sections.append(Section("units", "Units", "Units and nulls", panels=panels))
    if curves:
        panels = [
            Panel(
                f"{label} by layer",
                "Held-out in full lines, train dotted and hollow; nulls, held-out, in grey.",
                {title: layers(here, key, label) for title, here in curves.items()},
            )
            for key, label in {"r2": "R²", "q_star": "Stability q*"}.items()
        ]
        sections.append(Section("layers", "Layers", "Layers", panels=panels))
    return sections


def _scale(folders: Sequence[Folder]) -> list[Section]:
    found = [(f, hook, one) for f in folders for hook, one in f.studies.get("scale", {}).get("hooks", {}).items()]
    if not found:
        return []
    panels = [
        Panel(
            f"R² over capacity, {split.replace('heldout', 'held-out')}",
            "Means over seeds with their range; dotted with squares, the null of shuffled coordinates; thin uprights "
            "are at F = n.",
            {f"{f.name} · {hook}": cliff(one, split) for f, hook, one in found},
        )
        for split in ("heldout", "train")
    ]
    drawn = {f"{f.name} · {hook}": law(one) for f, hook, one in found}
    panels.append(
        Panel(
            "Critical capacity",
            "The F at which mean R² passes a level, over n, and the power law through it; squares: the shuffled null.",
            {label: one for label, one in drawn.items() if one is not None},
        )
    )
    return [
        Section(
            "capacity", "Capacity", "Capacity", panels=panels, tables=[study_tables.laws(f, h) for f, h, _ in found]
        )
    ]


def _interventions(folders: Sequence[Folder]) -> list[Section]:
    shown = [folder for folder in folders if "intervene" in folder.studies]
    found = {folder.name: folder.studies["intervene"] for folder in shown}
    if not found:
        return []
    every: dict[str, tuple[Any, str]] = {
        "Answers flipped": (
            flips,
            "Facts about held-out subjects, A's code or activation replaced by B's, as the table spells out; "
            "bars are 95% intervals.",
        ),
        "Dose-response": (doses, "The swap at a fraction of its strength, or beyond it; bars are 95% intervals."),
        "Ablations": (
            ablations,
            "A's strongest atoms set to zero; dotted, the null of as many random atoms; bars are 95% intervals.",
        ),
    }
    panels = [
        Panel(title, caption, {name: draw(result) for name, result in found.items()})
        for title, (draw, caption) in every.items()
    ]
    swaps = [study_tables.swaps(folder) for folder in shown]
    return [Section("interventions", "Interventions", "Interventions", panels=panels, tables=swaps)]
