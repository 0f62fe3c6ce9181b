"""judge.json as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atom_lens.views.table import aligned

_SPLITS = {"heldout": "held-out rows", "all": "all rows, including those that the atoms were trained on"}


def judge_table(found: Mapping[str, Any]) -> str:
    """What `judge` found, every number with its null, its split and its n."""
    blocks = [f"{found['hook']} of {found['model']}"]
    if found["purity"] is None:
        blocks.append("no purity: the prompts have no answers, or all have the same one")
    else:
        blocks += [_purity(_SPLITS[split], part) for split, part in found["purity"].items()]
    judged = found["judge"]
    if judged is None:
        blocks.append("no judge was asked: name one with model=")
    elif "estimate" in judged:
        blocks.append(_estimate(judged))
    else:
        blocks.append(_judged(judged))
    return "\n\n".join(blocks)


def _purity(split: str, part: Mapping[str, Any]) -> str:
    heads = ["", "latents", "left out", "active", "bits", "by chance", "above", "after FDR"]
    heads += ["purity", "by chance", "above", "after FDR"]
    cells = [heads]
    for kind, one in part["kinds"].items():
        row = [kind, str(one["latents"]), str(one["left_out"])]
        if one["latents"] == 0:
            cells.append([*row, *["none"] * (len(heads) - 3)])
            continue
        row.append(f"{one['active_p50']:g}")
        for key, digits in (("information", 4), ("purity", 3)):
            score = one[key]
            low, high = score["null_interval"]
            row += [f"{score['mean']:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"]
            row += [f"{score['above_null']:.1%}", f"{score['above_null_fdr']:.1%}"]
        cells.append(row)
    entropy = next(iter(part["kinds"].values()))["entropy"]
    head = (
        f"purity, {split}: n = {part['n']}, {part['labels']} labels, {entropy:.2f} bits, the commonest is "
        f"{part['commonest_label']:.1%}"
    )
    return f"{head}\n\n{aligned(cells)}"


def _estimate(judged: Mapping[str, Any]) -> str:
    one = judged["estimate"]
    dollars = f"at most ${one['dollars_at_most']:.2f}" if one["dollars_at_most"] else "no prices given"
    return (
        f"a judge would be asked {one['questions']} questions: about {one['read']:,} tokens read, at most "
        f"{one['written_at_most']:,} written, {dollars}; nothing was asked (dry run)"
    )


def _judged(judged: Mapping[str, Any]) -> str:
    cells: list[Sequence[str]] = [["", "of", "score 1-5", "95%", "above floor", "detection", "95%", "above floor"]]
    cells[0] = [*cells[0], "unparsed"]
    for kind, one in judged["kinds"].items():
        row = [kind, str(judged["living"][kind])]
        for task, digits in (("rubric", 2), ("detection", 3)):
            of = one[task]
            row.append("none" if of["mean"] is None else f"{of['mean']:.{digits}f} ({of['n']})")
            row += [_range(of["interval"], digits), _range(of["above_control_interval"], digits, "+")]
        row.append(" / ".join(_share(one[task]["unparsed"]) for task in ("rubric", "detection")))
        cells.append(row)
    lines = [
        f"judge {judged['model']}, prompts {judged['prompts']}; n of a score in brackets; the floor is random rows; "
        "chance level of detection is 0.5",
        "",
        aligned(cells),
        "",
        f"{judged['answered']} of {judged['questions']} questions answered, {judged['asked_now']} asked now; "
        f"{judged['read']:,} tokens read, {judged['written']:,} written, {_dollars(judged)} (including answers of "
        "earlier calls)",
    ]
    if not judged["complete"]:
        lines.append("INCOMPLETE: the budget is spent; the same command with a larger one resumes from here")
    for name, one in judged["agreement"].items():
        lines.append(
            f"agreement with the {name.replace('_', ' ')} over {one['n']} scores: Spearman {_number(one['spearman'])}, "
            f"quadratic kappa {_number(one['kappa'])}"
        )
    return "\n".join(lines)


def _range(interval: Sequence[float] | None, digits: int, sign: str = "") -> str:
    return "none" if interval is None else f"{interval[0]:{sign}.{digits}f} to {interval[1]:{sign}.{digits}f}"


def _dollars(judged: Mapping[str, Any]) -> str:
    if judged["budget"] is None:
        return "no prices given, so no cap"
    return f"${judged['dollars']:.4f} of ${judged['budget']:.2f}"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
