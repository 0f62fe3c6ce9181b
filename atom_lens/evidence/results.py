"""The results of evidence as types: report.json is one `Report`."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from atom_lens.storage.schema import Result

Interval = list[float]  # [low, high]: 95% percentile bootstrap


class L0(Result):
    """Number of active atoms per activation."""

    mean: float
    p50: int
    p998: int
    max: int


class Coherence(Result):
    """Of pairs of living atoms, under the metric."""

    p50: float
    p998: float
    max: float


class Figures(Result):
    """A dictionary on one split."""

    n: int = Field(description="activations measured")
    r2: float = Field(description="1 - sum ‖x - x̂‖² / sum ‖x - mean x‖², pooled over rows, mean taken on this split")
    r2_aip: float = Field(description="the same in the norm of the metric: every direction counts the same")
    q_star: float = Field(
        description="stability: sup { q : mu_q < 1/(2 K_q - 1) }, exact; mu_q is a quantile of the coherence of pairs "
        "of atoms alive on this split, K_q of the L0 of its codes"
    )
    l0: L0
    empty_codes: float = Field(description="share of activations with no active atom; they satisfy q* for free")
    dead_atoms: int = Field(description="atoms that never fire on this split; left out of the pairs")
    coherence: Coherence
    interval: dict[str, Interval] | None = Field(
        default=None, description="held-out only: of r2, r2_aip and q_star, 95% bootstrap over subjects"
    )


class Loss(Result):
    """What a dictionary costs the language model it is spliced into: next-token cross-entropy in nats per token."""

    n: int = Field(description="tokens that were predicted")
    clean: float = Field(description="cross-entropy of the model as it is")
    ablated: float = Field(description="with zeros in the place of the activations")
    spliced: float = Field(description="with the reconstructions in their place, except at the first token")
    recovered: float = Field(description="(ablated - spliced) / (ablated - clean), sae-lens' ce_loss_score")
    kl: float = Field(description="KL(clean || spliced) of the next token, nats, mean over all tokens")


class Excess(Result):
    """How far the atoms are above a null, on the same subjects."""

    value: float
    interval: Interval


class NullFigures(Figures):
    """A null on one split."""

    r2_euclidean_pursuit: float | None = Field(
        default=None,
        description="drawn nulls only: R² of a pursuit in the Euclidean norm, the null's best in that norm",
    )
    excess: dict[str, Excess] | None = Field(
        default=None, description="held-out only: of r2, r2_aip and q_star, the atoms' value less the null's"
    )

    @property
    def best_r2(self) -> float:
        """R² at its best in the Euclidean norm."""
        return self.r2 if self.r2_euclidean_pursuit is None else self.r2_euclidean_pursuit


class Null(Result):
    """A dictionary that has learned nothing, on both splits."""

    d_sae: int
    train: NullFigures | None = None
    heldout: NullFigures | None = None


class Rip(Result):
    """The largest K, and (K - 1) mu; below 1 it proves that sparse codes are unique."""

    k: int
    bound: float


class Codes(Result):
    """The share of up to 256 codes with an active atom that their own support certifies."""

    n: int
    babel: float | None = Field(description="by the Babel function")
    exact_recovery: float | None = Field(description="by the exact recovery condition")


class Agreement(Result):
    """Whether a sparse solver finds the supports that the encoder found."""

    same_support: float | None = Field(description="share of codes whose whole support is found")
    shared_atoms: float = Field(description="mean share of the support")


class Recovery(Result):
    """Sparse solvers on codes with at most 64 active atoms, from the reconstruction and from the activation."""

    n: int
    omp_reconstruction: Agreement
    bp_reconstruction: Agreement
    omp_activation: Agreement
    bp_activation: Agreement | None = Field(
        default=None, description="basis pursuit on the activation itself, its path cut at 4 K steps"
    )
    under_noise: Agreement | None = Field(
        default=None,
        description="the encoder itself, on the reconstruction plus noise of the size of the residual, isotropic under "
        "the metric",
    )


class Eps(Result):
    """Coherence of each atom with its closest other one."""

    median: float
    max: float


class Window(Result):
    """The threshold window of the identifiability theorem, coefficients on atoms of unit AIP norm."""

    eps: Eps
    k: int
    delta_min: float
    delta_max: float
    feasible: float | None = Field(description="share of atoms whose window is open")
    inside: float | None = Field(description="share of atoms whose threshold lies in it")
    outside_by_median: float = Field(description="how far a threshold is from its window, as a coefficient")
    outside_by_median_tau: float = Field(description="the same in units of the threshold")


class Certificates(Result):
    """What coherence proves, on one split; all None where no atom is alive."""

    split: str = "heldout"
    rip: Rip | None = None
    unique_atoms: float | None = Field(
        default=None,
        description="share of living atoms that pass the strict condition for the largest code they occur in",
    )
    codes: Codes | None = None
    recovery: Recovery | None = None
    window: Window | None = None


class IdentityFigures(Result):
    """Agreement of runs from independent starts."""

    runs: int
    pw_mcc: float = Field(description="mean coherence of matched atoms, over all pairs of runs")
    pw_mcc_start: float | None = Field(default=None, description="the same before training")
    above_09: float = Field(description="share of atoms matched at a coherence above 0.9")
    level: float = Field(description="coherence that the best of as many random directions exceeds once in 100 times")
    above_level: float = Field(description="share of atoms matched above it")
    pairs: list[float] = Field(description="PW-MCC of each pair of runs")


class Angles(Result):
    """Angles between activations in degrees, of all pairs of up to 5,000 rows."""

    mean: float
    median: float
    percentiles: dict[str, float] = Field(description="0.1 to 99.9")


class MetricAbout(Result):
    """The atomic inner product, and what it was estimated from."""

    n: int
    ridge: float = Field(description="rho in S = (C + rho tr(C)/d I)⁻¹")
    condition: float = Field(description="condition number of the regularised C")
    source: str = ""


class Another(Result):
    """Another dictionary of the same size, trained on the same activations."""

    train: Figures
    heldout: Figures


class Distilled(Another):
    """A plain TopK SAE over the atoms of a pursuit: what a single encoder matrix loses."""

    k: int = Field(description="atoms of a code")
    shared_atoms: float = Field(description="mean share of a held-out code of the pursuit that its own code shares")


class Report(Result):
    """What a dictionary is worth, train and held-out, compared with nulls of the same F and K."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    schema_version: int = 2
    name: str | None = None
    kind: str | None = Field(
        default=None, description="of the dictionary, as recipes name it; None where it is unknown"
    )
    model: str | None = None
    hook: str | None = None
    positions: str | None = None
    massive_rows_dropped: int | None = Field(
        default=None, description="rows whose norm exceeds `massive_ratio` medians"
    )
    n: int = Field(description="training activations")
    d_in: int = Field(description="their width d")
    d_sae: int = Field(description="number of atoms F")
    n_over_f: float = Field(description="n / F; at 1 or below, each activation can have its own atom")
    metric: MetricAbout
    angles: dict[str, Angles] = Field(description="`euclidean` and `aip`, of training activations")
    train: Figures
    heldout: Figures | None = None
    certificates: Certificates
    nulls: dict[str, Null] = Field(description="`random` and `data`; `frozen` and `shuffled` where they were trained")
    identity: IdentityFigures | None = Field(default=None, description="with `training.seeds` above 1")
    distilled: Distilled | None = Field(default=None, description="with `atoms.pursuit.distilled`")
    also: dict[str, Another] = Field(default={}, description="other kinds of dictionaries: those of `training.also`")
    seconds: dict[str, float] = {}
    versions: dict[str, str]
