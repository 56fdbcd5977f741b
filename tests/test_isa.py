"""ISA levels: forced, refused, restored."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import effvlm
from effvlm import _core


def _child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False, cwd="/"
    )


def test_every_supported_level_can_be_forced_and_left() -> None:
    best = _core.cpu_isa()
    for name in _core.cpu_isas():
        effvlm.set_cpu_isa(name)
        assert _core.cpu_isa() == name
    effvlm.set_cpu_isa(None)
    assert _core.cpu_isa() == best


def test_an_unknown_level_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"one of scalar, avx2, .* got 'sse9'"):
        effvlm.set_cpu_isa("sse9")


def test_an_unsupported_level_is_refused_and_nothing_changes() -> None:
    missing = [name for name in ("avx2", "avx512", "amx") if name not in _core.cpu_isas()]
    if not missing:
        pytest.skip("this machine supports every level")
    before = _core.cpu_isa()
    with pytest.raises(ValueError, match="expected a level that this machine supports"):
        effvlm.set_cpu_isa(missing[0])
    assert _core.cpu_isa() == before


def test_the_environment_variable_forces_a_level() -> None:
    done = _child("from effvlm import _core; print(_core.cpu_isa())", EFFVLM_CPU_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


def test_a_wrong_environment_variable_fails_at_import() -> None:
    done = _child("import effvlm", EFFVLM_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "EFFVLM_CPU_ISA: expected one of scalar" in done.stderr


def test_loops_share_torchs_openmp() -> None:
    assert _core.openmp_runtime()
    done = _child("import effvlm; print(sum('libgomp' in l and 'r-x' in l for l in open('/proc/self/maps')))")
    assert done.stdout.strip() == "1", "two OpenMP runtimes in one process"
