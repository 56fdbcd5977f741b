"""Seeds, and one line at the end that counts what this machine could not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from levels import LEVELS, why_not

_skipped: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param(level, marks=[pytest.mark.cuda] if level == "cuda" else []) for level in LEVELS])
def level(request: Any) -> str:
    """Each place an op can run; those that this machine lacks are skipped and counted."""
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    return str(request.param)


def pytest_runtest_logreport(report: Any) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason, count in sorted(_skipped.items()):
        terminalreporter.write_line(f"not run here: {count} tests ({reason})")
