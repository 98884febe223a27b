"""The rules that many tests go through, each set for one bad client of at least seven."""

from __future__ import annotations

from flcore.aggregation import (
    CAF,
    MDA,
    SMEA,
    Bulyan,
    CenteredClipping,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    Phocas,
    PrincipalGradient,
    TrimmedMean,
)


def ident(rule) -> str:
    return type(rule).__name__ + getattr(rule, "convention", "")


RULES = [
    Krum(1),
    Krum(1, "byzfl"),
    Krum(1, "garfield"),
    MultiKrum(1),
    MultiKrum(1, convention="monna"),
    Bulyan(1),
    Bulyan(1, iterative=False),
    GeometricMedian(),
    GeometricMedian("byzfl"),
    GeometricMedian("rfa"),
    CenteredClipping(2.0),
    CenteredClipping(2.0, 3),
    MDA(1),
    SMEA(1),
    CAF(1),
    NearestNeighborAverage(1),
    FlagAggregator(2, 3),
    PrincipalGradient(),
    Median(),
    TrimmedMean(1),
    MeaMed(1),
    Phocas(1),
]
GRAM = [r for r in RULES if not isinstance(r, Median | TrimmedMean | MeaMed | Phocas)]
