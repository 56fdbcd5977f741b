"""The per-op regression view: ``pytest bench --benchmark-only`` (``--benchmark-compare`` to see what changed)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specs import Case, Spec, specs

SMALLEST = [pytest.param(s, min((c for c in s.cases if c.bench), key=s.flops), id=s.op) for s in specs()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), SMALLEST)
def test_op(benchmark: Any, spec: Spec, case: Case, dtype: torch.dtype) -> None:
    """The smallest bench case of each op."""
    args = spec.inputs(case, dtype, torch.Generator().manual_seed(0))
    benchmark.pedantic(spec.timed, args, rounds=20, warmup_rounds=2)
