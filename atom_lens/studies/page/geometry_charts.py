"""How activations lie to each other, and how atoms do: angles, and coherences against the thresholds of uniqueness."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from atom_lens.dictionaries.nulls import random_atoms
from atom_lens.evidence.measure import Observation
from atom_lens.evidence.stability import Stability, stability
from atom_lens.geometry import AtomicInnerProduct, angle_histogram
from atom_lens.recipe.contexts import Corpus
from atom_lens.studies.page.charts import ATOMS, QUIET, SERIES, figure

_ROWS = 5000
_DEGREES = 180  # bins of one degree
_LABEL = 0.13  # height of a label, as a share of the figure's
_LEAST = 2**-10  # coherences below are not drawn: their axis is logarithmic


def angles(corpus: Corpus, metric: AtomicInnerProduct) -> go.Figure:
    """Angles between activations, up to 5,000 of either split, Euclidean and under the metric."""
    made = figure("angle between two activations, degrees", "share of pairs per degree")
    held, kept = (_some(mask) for mask in (corpus.heldout, ~corpus.heldout))
    for name, rows, under, color, dash in (
        ("Euclidean, train", kept, None, SERIES[1], "solid"),
        ("Euclidean, held-out", held, None, SERIES[1], "dot"),
        ("AIP, train", kept, metric, ATOMS, "solid"),
        ("AIP, held-out", held, metric, ATOMS, "dot"),
    ):
        found = angle_histogram(corpus.x[rows], under, bins=_DEGREES)
        share = found.counts.double() / found.pairs
        made.add_scatter(
            x=((found.edges[1:] + found.edges[:-1]) / 2).numpy(),
            y=share.numpy().astype(np.float32),
            name=f"{name}: mean {found.mean:.1f}°",
            mode="lines",
            line={"color": color, "width": 2, "dash": dash, "shape": "hvh"},
            fill="tozeroy" if dash == "solid" else "none",
            hovertemplate="%{x:.1f}°: %{y:.2%}<extra>" + name + "</extra>",
        )
    made.add_vline(90, line={"color": QUIET, "width": 1, "dash": "dash"}, annotation={"text": "90°", "yshift": -4})
    made.update_xaxes(range=[0, 180], tickvals=[0, 30, 60, 90, 120, 150, 180])
    made.update_yaxes(tickformat=".0%", rangemode="tozero")
    return made


def _some(mask: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    rows = mask.nonzero()[:, 0]
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).long()]


def coherences(seen: Observation, metric: AtomicInnerProduct, seed: int) -> go.Figure | None:
    """Coherences of the pairs of atoms alive on a split, of as many random directions, and 1 / (2K - 1) of its codes.

    None where no two atoms are alive.
    """
    if seen.found.pairs == 0:
        return None
    directions = random_atoms(seen.found.n_atoms, metric, torch.Generator().manual_seed(seed))
    null = stability(directions, seen.l0, metric)
    lowest = 0.5 / seen.found.pairs
    made = figure("coherence of two atoms under the AIP", "share of pairs")
    for name, found, color, fill in (
        ("atoms", seen.found, ATOMS, "tozeroy"),
        ("random directions", null, QUIET, "none"),
    ):
        centres, share = _logarithmic(found)
        # An empty bin has no logarithm: it goes below the axis.
        made.add_scatter(
            x=centres,
            y=np.maximum(share, lowest / 100),
            name=name,
            mode="lines",
            line={"color": color, "width": 2, "shape": "hvh", "dash": "solid" if color == ATOMS else "dash"},
            fill=fill,
            customdata=share,
            hovertemplate="%{x:.3f}: %{customdata:.3%}<extra>" + name + "</extra>",
        )
    # Labels to the left of their lines, each line as high as its label: so none crosses another's.
    thresholds = _thresholds(seen.found)
    for row, (k, label) in enumerate(thresholds):
        at, top, left = 1 / (2 * k - 1), 1 - _LABEL * row, k < 125
        above = (1 - int(one.below[k]) / one.pairs for one in (seen.found, null))
        made.add_shape(x0=at, x1=at, y0=0, y1=top, yref="paper", line={"color": SERIES[1], "width": 1.5})
        made.add_annotation(
            x=np.log10(at),
            y=top,
            yref="paper",
            yanchor="top",
            xanchor="right" if left else "left",
            align="right" if left else "left",
            text=f"K = {k}, {label}<br>{_percent(next(above))} above, random {_percent(next(above))}",
            showarrow=False,
            font={"size": 11},
            xshift=-4 if left else 4,
        )
    made.update_xaxes(type="log", range=[np.log10(_LEAST), 0.02], tickvals=[0.001, 0.01, 0.1, 1])
    # Room for the labels above 15%, which hardly a bin reaches.
    bottom, room = np.log10(lowest), _LABEL * len(thresholds)
    powers = range(int(np.floor(bottom)), 0)
    made.update_yaxes(
        type="log",
        range=[bottom, (np.log10(0.15) - room * bottom) / (1 - room)],
        tickvals=[10.0**power for power in powers],
        ticktext=[f"{100 * 10.0**power:g}%" for power in powers],
    )
    return made


def _logarithmic(found: Stability) -> tuple[np.ndarray, np.ndarray]:
    """Bins of equal ratio, made of the narrow ones of `Stability`; shares of all pairs."""
    bins = len(found.coherence_counts)
    edges = np.unique((bins * np.geomspace(_LEAST, 1, 61)).round().astype(int))
    below = np.concatenate([[0], found.coherence_counts.cumsum(0).numpy()])
    counts = np.diff(below[edges])
    return np.sqrt(edges[1:] * edges[:-1]) / bins, (counts / found.pairs).astype(np.float32)


def _thresholds(found: Stability) -> list[tuple[int, str]]:
    """K and what it is of the codes: median, 99.8% and largest L0, those of one value together."""
    levels = [(found.l0_quantile(0.5), "median"), (found.l0_quantile(0.998), "99.8%"), (int(found.l0[-1]), "largest")]
    together = groupby(((max(1, k), name) for k, name in levels), key=lambda level: level[0])
    return [(k, " and ".join(name for _, name in names)) for k, names in together]


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "< 0.01%"
    return f"{share:.2%}" if share < 0.01 else f"{share:.1%}"
