"""Aggregation rules by name, as settings and the command line write them.

``trimmed-mean:f=2``, or with what comes before it, ``nnm:f=2 >> trimmed-mean:f=2``.
"""

from __future__ import annotations

from functools import reduce
from operator import rshift
from typing import Any

from flcore import aggregation
from flcore.aggregation._rule import PreAggregator, Rule
from flcore.compression._settings import as_text, from_text
from flcore.errors import InvalidInputError

__all__ = ["PREAGGREGATORS", "RULES", "rule_from_text", "rule_to_text"]

RULES: dict[str, type[Rule]] = {
    "mean": aggregation.Mean,
    "median": aggregation.Median,
    "trimmed-mean": aggregation.TrimmedMean,
    "meamed": aggregation.MeaMed,
    "phocas": aggregation.Phocas,
    "krum": aggregation.Krum,
    "multi-krum": aggregation.MultiKrum,
    "bulyan": aggregation.Bulyan,
    "geometric-median": aggregation.GeometricMedian,
    "centered-clipping": aggregation.CenteredClipping,
    "mda": aggregation.MDA,
    "smea": aggregation.SMEA,
    "caf": aggregation.CAF,
    "nna": aggregation.NearestNeighborAverage,
    "flag": aggregation.FlagAggregator,
    "principal-gradient": aggregation.PrincipalGradient,
}

PREAGGREGATORS: dict[str, type[PreAggregator]] = {
    "nnm": aggregation.NNM,
    "bucketing": aggregation.Bucketing,
    "clipping": aggregation.Clipping,
    "arc": aggregation.ARC,
}


def rule_from_text(text: str) -> Any:
    """Give the rule that a text describes.

    Raises
    ------
    InvalidInputError
        If there is no such rule, or it has no such setting.

    Examples
    --------
    >>> rule_to_text(rule_from_text("nnm:f=2>>trimmed-mean:f=2"))
    'nnm:f=2>>trimmed-mean:f=2'
    """
    *before, last = (part.strip() for part in text.split(">>"))
    try:
        parts = [from_text(PREAGGREGATORS, part) for part in before]
        return reduce(rshift, [*parts, from_text(RULES, last)])
    except InvalidInputError as error:
        raise InvalidInputError(f"aggregation: {error}") from None
    except TypeError as error:  # a setting without default was left out
        raise InvalidInputError(f"aggregation: {text!r}: {error}") from None


def rule_to_text(rule: Any) -> str:
    """Give the text that `rule_from_text` reads."""
    if isinstance(rule, aggregation.Pipeline):
        return ">>".join(rule_to_text(part) for part in (*rule.before, rule.rule))
    names = {cls: name for name, cls in (RULES | PREAGGREGATORS).items()}
    if type(rule) not in names:
        return repr(rule)
    return as_text(names[type(rule)], rule)
