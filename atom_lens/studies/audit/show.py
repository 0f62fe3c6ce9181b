"""An audit as a reader sees it: a table per dictionary, and how to read it."""

from __future__ import annotations

from atom_lens.evidence.results import IdentityFigures
from atom_lens.studies.audit.result import Audit, Audited, Measured
from atom_lens.studies.study import Part
from atom_lens.views.table import Row, Table

_HEADS = ["held-out", "R²", "R² (AIP)", "L0", "99.8%", "q*", "dead", "CE recovered", "KL"]
_LABELS = {
    "random": "null: random directions, pursuit",
    "data": "null: data points, pursuit",
    "random_euclidean": "null: random directions, Euclidean",
    "data_euclidean": "null: data points, Euclidean",
}


def show(result: Audit, name: str) -> list[Part]:
    """A table for each dictionary, and one of their agreement."""
    tables = [_table(result, one) for one in result.dictionaries]
    if result.agreement:
        rows = [Row(" and ".join(one.names), _agreement(one.figures)) for one in result.agreement]
        heads = ["agreement under the AIP", "PW-MCC", "above 0.9", "above chance", "chance level"]
        note = "PW-MCC is the mean coherence of living atoms matched one to one."
        tables.append(Table("", heads, rows, notes=[note]))
    return [Part("Audit", tables)]


def _agreement(found: IdentityFigures) -> list[str]:
    return [f"{found.pw_mcc:.3f}", f"{found.above_09:.1%}", f"{found.above_level:.1%}", f"{found.level:.3f}"]


def _table(result: Audit, one: Audited) -> Table:
    own = "its own encoder"
    measured = {own: one.own, "refit by least squares": one.refit, "its atoms, pursuit": one.pursued}
    rows = [Row(label, _cells(found)) for label, found in measured.items() if found is not None]
    rows += [Row(_LABELS.get(null, null), _cells(found), null=True) for null, found in one.nulls.items()]
    where = f"{result.hook} of {result.model}" if result.model else "given activations"
    facts = [
        ("d_sae", f"{one.d_sae:,}"),
        ("n held-out", f"{result.n_heldout:,}"),
        ("n for the metric", f"{result.n:,}"),
        ("text", result.text),
    ]
    return Table(f"{one.name} ({one.architecture}) · {where}", _HEADS, rows, facts=facts, notes=verdicts(one))


def _cells(found: Measured) -> list[str]:
    figures, loss = found.figures, found.loss
    cells = [
        f"{figures.r2:.3f}",
        f"{figures.r2_aip:.3f}",
        f"{figures.l0.mean:.1f}",
        str(figures.l0.p998),
        f"{figures.q_star:.3f}",
        f"{figures.dead_atoms:,}",
    ]
    return [*cells, *(["", ""] if loss is None else [f"{loss.recovered:.3f}", f"{loss.kl:.3f}"])]


def verdicts(one: Audited) -> list[str]:
    """What the numbers say, a sentence each."""
    own, found = one.own.figures, []
    if own.r2 < 0:
        found.append(
            f"R² is {own.r2:.2f}: the mean activation explains more. Dictionaries are worth little on data far from "
            "their training data; check model, hook and text."
        )
    if one.pursued is not None and (data := one.nulls.get("data")) is not None:
        pursued, null = one.pursued.figures, data.figures
        higher = {"R²": pursued.r2 > null.r2, "R² (AIP)": pursued.r2_aip > null.r2_aip}
        if better := [label for label, is_higher in higher.items() if is_higher]:
            found.append(
                f"Under the same pursuit its atoms explain more than bare data points in {' and '.join(better)}."
            )
        if worse := [label for label, is_higher in higher.items() if not is_higher]:
            found.append(f"Bare data points under the same pursuit explain as much or more in {' and '.join(worse)}.")
    if (data := one.nulls.get("data_euclidean")) is not None and data.figures.r2 >= own.r2:
        found.append(
            f"Bare data points under a Euclidean pursuit have R² {data.figures.r2:.3f}: R² alone is no evidence here."
        )
    if (random := one.nulls.get("random")) is not None and random.figures.q_star >= own.q_star:
        found.append("Random directions reach the same q* at this L0, so q* is no evidence here.")
    return [*found, *([one.why] if one.why else [])]
