"""A report as a reader sees it: atoms and nulls in a table, what is proved, what is no evidence, and plots."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from atom_lens.dictionaries import Kind, kind
from atom_lens.evidence.results import Figures, NullFigures, Report
from atom_lens.studies.points import LABELS, SPLITS, Measured, layers, over_layers, plane, value
from atom_lens.studies.study import Part
from atom_lens.studies.train.result import RunReport
from atom_lens.views.plot import ATOMS, Draw, Panel
from atom_lens.views.table import Cell, Row, Table, shown_interval

_ATOMS = Kind(name="atoms", label="atoms", role="ours", color=ATOMS, marker="*")
GROUPS = [("", 1), *((label, 2) for label in LABELS.values()), ("L0", 2), ("dead atoms", 2)]


def show(result: RunReport, name: str) -> list[Part]:
    """Tables of all hooks, and their plots."""
    hooks = {f"{hook} of {report.model}": report for hook, report in result.hooks.items()}
    tables = [report_table(report, f"{name} · {hook}") for hook, report in hooks.items()]
    panels = {hook: evidence(report) for hook, report in hooks.items()}
    parts = [
        Part(
            "Results and nulls",
            tables,
            intro="Held-out activations are of subjects that no training saw. The small print below a held-out value "
            "of the atoms is its 95% interval over subjects; below that of a null, it is the interval of the atoms' "
            "lead over it on the same subjects.",
        ),
        Part(
            "Geometry",
            panels=[
                Panel(
                    "Angles between activations",
                    "Median, 90% and 99.8% of pairs; the metric was estimated on the training split only, and works if "
                    "its angles centre on 90°.",
                    {hook: draws["Angles between activations"] for hook, draws in panels.items()},
                )
            ],
        ),
        Part(
            "Dictionaries and nulls",
            panels=[
                Panel(
                    f"{LABELS[key]} against stability q*",
                    "Filled markers are held-out, hollow ones train; up and to the right is better, but few active "
                    "atoms alone give a high q*.",
                    {hook: draws[LABELS[key]] for hook, draws in panels.items()},
                )
                for key in ("r2", "r2_aip")
            ],
        ),
    ]
    curves = over_layers({hook: measured(report) for hook, report in result.hooks.items()})
    if curves:
        parts.append(layers_part({f"{name}, {at}": here for at, here in curves.items()}))
    return parts


def layers_part(curves: dict[str, dict[int, list[Measured]]]) -> Part:
    """R² and q* over layers."""
    return Part(
        "Layers",
        panels=[
            Panel(
                f"{LABELS[key]} by layer",
                "Held-out: solid lines; train: dotted and hollow; nulls, held-out: grey.",
                {title: layers(here, key) for title, here in curves.items()},
            )
            for key in ("r2", "q_star")
        ],
    )


def _kind(report: Report) -> Kind:
    return kind(report.kind) if report.kind else _ATOMS


def measured(report: Report) -> list[Measured]:
    """The atoms and their nulls."""
    found = [Measured(_kind(report), "", [_splits(report.train, report.heldout)])]
    for name, one in report.also.items():
        found.append(Measured(kind(name), "", [_splits(one.train, one.heldout)]))
    for name, null in report.nulls.items():
        found.append(Measured(kind(f"null_{name}"), "", [_splits(null.train, null.heldout)]))
    return found


def _splits(train: Figures | None, heldout: Figures | None) -> dict[str, Figures]:
    return {name: one for name, one in (("train", train), ("heldout", heldout)) if one is not None}


def evidence(report: Report) -> dict[str, Draw]:
    """The plots of one report: angles, and R² against q* in both norms."""
    found = measured(report)
    return {
        "Angles between activations": lambda axes: _angles(axes, report),
        "R²": plane(found, "r2"),
        "R² (AIP)": plane(found, "r2_aip"),
    }


def _angles(axes: Axes, report: Report) -> None:
    for height, name in ((1, "euclidean"), (0, "aip")):
        found = report.angles[name]
        for low, high, width in (("0.1", "99.9", 1.5), ("5", "95", 7)):
            axes.plot([found.percentiles[low], found.percentiles[high]], [height] * 2, color="#3b82c4", linewidth=width)
        axes.plot([found.median], [height], "o", color=ATOMS, markersize=8)
        axes.text(min(max(found.median, 14), 166), height + 0.16, f"{found.median:.1f}°", ha="center")
    axes.axvline(90, linestyle=":", linewidth=1, color=ATOMS)
    axes.set(xlim=(0, 180), ylim=(-0.5, 1.5), yticks=[0, 1], yticklabels=["AIP", "Euclidean"])
    axes.set(xticks=[0, 45, 90, 135, 180], xlabel="degrees")


def report_table(report: Report, title: str = "") -> Table:
    """Atoms and nulls, held-out and train, with 95% intervals; then what is proved, and what is no evidence."""
    heads: list[Cell | str] = ["dictionary"]
    heads += [Cell(label, held=split == "heldout") for _ in GROUPS[1:] for split, label in SPLITS.items()]
    rows = [Row(_kind(report).label, _cells(_splits(report.train, report.heldout), _interval))]
    if one := report.distilled:
        rows.append(Row("distilled into TopK", _cells(_splits(one.train, one.heldout), _interval)))
    for name, one in report.also.items():
        rows.append(Row(kind(name).label, _cells(_splits(one.train, one.heldout), _interval)))
    for name, null in report.nulls.items():
        rows.append(Row(kind(f"null_{name}").label, _cells(_splits(null.train, null.heldout), _lead), null=True))
    facts = [
        ("n train", f"{report.n:,}"),
        ("n held-out", f"{report.heldout.n:,}" if report.heldout else "none"),
        ("F", f"{report.d_sae:,}"),
        ("n / F", f"{report.n_over_f:.2f}"),
    ]
    notes = [certificates_text(report), reading(report)]
    return Table(title, heads, rows, GROUPS, facts, notes)


def _cells(splits: dict[str, Figures], below: Callable[[Figures, str], str]) -> list[Cell]:
    cells = []
    for key in LABELS:
        for split in SPLITS:
            one = splits.get(split)
            cells.append(Cell(f"{value(one, key):.4f}", below(one, key), split == "heldout") if one else Cell("–"))
    for show_ in (lambda f: (f"{f.l0.mean:.2f}", f"99.8%: {f.l0.p998}"), lambda f: (f"{f.dead_atoms:,}", "")):
        for split in SPLITS:
            one = splits.get(split)
            cells.append(Cell(*show_(one), split == "heldout") if one else Cell("–"))
    return cells


def _interval(found: Figures, key: str) -> str:
    return shown_interval(found.interval[key]) if found.interval else ""


def _lead(found: Figures, key: str) -> str:
    excess = found.excess if isinstance(found, NullFigures) else None
    return f"atoms {shown_interval(excess[key].interval, sign='+')}" if excess else ""


def certificates_text(report: Report) -> str:
    """What is proved about these atoms and codes, and how well other runs agree, one line each."""
    found = report.certificates
    where = "held-out" if found.split == "heldout" else "training"
    if found.rip is None or found.codes is None:
        return f"certificates ({where} codes): none, because no atom is alive"
    lines = [
        f"RIP bound (K - 1) mu at the largest K = {found.rip.k}: {found.rip.bound:.2f}, a proof only below 1",
        f"atoms that are unique in every code they occur in: {_percent(found.unique_atoms)}",
        f"codes certified by their own support: {_percent(found.codes.exact_recovery)} (exact recovery condition), "
        f"{_percent(found.codes.babel)} (Babel function), of {found.codes.n}",
    ]
    if one := found.recovery:
        lines.append(
            f"same support found from the reconstruction: {_percent(one.omp_reconstruction.same_support)} by matching "
            f"pursuit, {_percent(one.bp_reconstruction.same_support)} by basis pursuit; from the activation "
            f"{_percent(one.omp_activation.same_support)}, sharing {_percent(one.omp_activation.shared_atoms)} of the "
            "atoms"
        )
    if found.window:
        lines.append(
            f"thresholds inside the window of the identifiability theorem: {_percent(found.window.inside)} "
            f"(it is open for {_percent(found.window.feasible)} of the atoms)"
        )
    text = "\n".join([f"certificates ({where} codes)", *(f"  {line}" for line in lines)])
    if same := report.identity:
        start = "" if same.pw_mcc_start is None else f" ({same.pw_mcc_start:.3f} before training)"
        text += (
            f"\nidentity over {same.runs} runs\n"
            f"  PW-MCC {same.pw_mcc:.3f}{start}, {_percent(same.above_09)} of the atoms above 0.9, "
            f"{_percent(same.above_level)} above the best random match ({same.level:.3f})"
        )
    return text


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def reading(report: Report) -> str:
    """In a few sentences, which numbers of this report are evidence, and which are not."""
    ratio = report.n_over_f
    text = f"n / F = {ratio:.2f}: {report.n} activations for {report.d_sae} atoms"
    data, random = (report.nulls[name].train for name in ("data", "random"))
    if ratio <= 1:
        reach = "" if data is None else f" (bare data points reach R² {data.best_r2:.4f} there)"
        text += (
            f", so each activation can have its own atom: the train column shows what can be memorised{reach}, only "
            "the held-out column shows what was learned."
        )
    elif ratio < 8:
        text += (
            ", so each atom has few activations and the train column is mostly in-sample fit: read the held-out "
            "column, and its distance from the data null."
        )
    else:
        text += ", too many to be memorised one by one: still, compare the held-out column with the data null."
    if random is not None and random.q_star >= 0.998:
        text += (
            f" Random directions reach q* {random.q_star:.4f} at this L0, so q* is no evidence here: it only says that "
            "few atoms were active."
        )
    return text
