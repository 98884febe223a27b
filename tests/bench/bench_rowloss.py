"""Cross-entropies of rows of logits with their gradient, beside torch."""

import pytest

from flcore.bench import select

CASES = [
    case for case in select("losses", "cpu") if "_ce_" in case.name and case.name[-1].isdigit()
]


@pytest.mark.parametrize("who", ["flcore", "F.cross_entropy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_rowloss(case, who, track):
    track(case, who)
