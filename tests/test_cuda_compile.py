"""Every CUDA kernel compiles for every architecture without a warning, and takes no more than the table says."""

from __future__ import annotations

import json
from typing import Any

import cuda_resources
import pytest

needs_nvcc = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="no nvcc")
UPDATE = "if that is worth it: python bench/cuda_resources.py --save, and say why"


def excess(allowed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is over the table, one sentence each."""
    wrong = []
    for file in sorted({*allowed, *found}):
        for kernel in sorted({*allowed.get(file, {}), *found.get(file, {})}):
            limits, taken = allowed.get(file, {}).get(kernel), found.get(file, {}).get(kernel)
            if limits is None or taken is None:
                wrong.append(f"{kernel} of {file} is {'not in the table' if limits is None else 'gone'}; {UPDATE}")
                continue
            for architecture, now in taken.items():
                before = limits.get(architecture, {"stack": 0, "spills": 0})
                wrong += [
                    f"{kernel} on {architecture}: {what} {now[what]} bytes, {before[what]} in the table; {UPDATE}"
                    for what in ("stack", "spills")
                    if now[what] > before[what]
                ]
    return wrong


@needs_nvcc
def test_kernels_compile_and_take_no_more_than_the_table_says() -> None:
    allowed = json.loads(cuda_resources.TABLE.read_text())
    assert excess(allowed["kernels"], cuda_resources.measure()["kernels"]) == []


def test_the_table_is_complete_and_its_markdown_is_its_own() -> None:
    table = json.loads(cuda_resources.TABLE.read_text())
    assert set(table["kernels"]) == {p.name for p in cuda_resources.sources()}
    for kernels in table["kernels"].values():
        for by_architecture in kernels.values():
            assert set(by_architecture) <= {f"sm_{a}" for a in cuda_resources.ARCHITECTURES}
    assert cuda_resources.TABLE.with_suffix(".md").read_text() == cuda_resources.markdown(table)


def test_a_spill_or_a_new_stack_frame_is_noticed() -> None:
    taken = {"registers": 40, "shared": 0, "stack": 0, "spills": 0}
    table = {"a.cu": {"k<float>": {"sm_80": taken}}}
    assert excess(table, table) == []
    assert excess(table, {"a.cu": {"k<float>": {"sm_80": {**taken, "registers": 41}}}}) == []
    for what in ("stack", "spills"):
        assert what in excess(table, {"a.cu": {"k<float>": {"sm_80": {**taken, what: 8}}}})[0]
    assert "not in the table" in excess({}, table)[0]
    assert "gone" in excess(table, {})[0]


def test_the_compilers_report_is_understood() -> None:
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6effvlm12_GLOBAL__N_11kIfEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN6effvlm12_GLOBAL__N_11kIfEEvPKT_
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem, 360 bytes cmem[0]
"""
    assert cuda_resources.parse(text) == {"k<float>": {"registers": 32, "shared": 2048, "stack": 16, "spills": 12}}
