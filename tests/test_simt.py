"""The emulator that stands in for a GPU must itself be shown to catch what it claims to catch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import simt
import torch

CAUGHT = {
    "out_of_bounds_global": "out-of-bounds global read",
    "out_of_bounds_shared": "out-of-bounds",
    "uninitialised_shared": "read of shared memory that nobody has written",
    "divergent_barrier": "not every thread of the block reaches",
    "early_exit_before_barrier": "not every thread of the block reaches",
    "inactive_shuffle": "not active|not every lane",
    "missing_syncthreads": r"race on shared memory: thread \d+ .* and thread \d+ |nobody has written",
    "missing_second_syncthreads": r"race on shared memory: thread \d+ .* and thread \d+ ",
    "missing_syncwarp": r"race on shared memory: thread \d+ .* and thread \d+ |nobody has written",
    "misaligned_vector": "misaligned vector access of 16 bytes",
    "race_between_blocks": r"race on global memory: thread \d+ of block \d .* of block \d",
    "atomic_or_not": "race on shared memory",
    "read_before_written": "read of output before it is written",
    "write_to_input": "write to input, which is an input",
    "left_unwritten": "output",
    "far_offset": "out-of-bounds global read",
    "grid_limit": "over the limits of CUDA",
    "copy_not_waited_for": "nobody has written",
    "copy_over_readers": r"race on shared memory: thread \d+ .* and thread \d+ |nobody has written",
}
SEEDS = range(5)


@pytest.fixture(scope="module")
def wrong() -> tuple[ModuleType, ModuleType]:
    module = simt.build([simt.HERE / "wrong_kernels.cu"], [simt.HERE / "wrong_module.cpp"], "_wrong")
    return module, simt.load_extension("_simt_control", Path(str(module.__file__)))


def _run(wrong: tuple[Any, Any], name: str, mistake: bool, seed: int) -> torch.Tensor:
    """Runs a kernel; raises what the emulator finds."""
    module, control = wrong
    far = 2**31 if name == "far_offset" else 0  # 8 GiB of addresses, of which one page is touched
    memory = torch.empty(far + 64)
    memory[far:] = torch.arange(64.0)
    out = torch.full((64,), -1.0)
    control.forget_all()
    control.set_seed(seed)
    control.allow(memory.data_ptr(), memory.numel() * 4, "input", False)
    control.allow(out.data_ptr(), 256, "output", True)
    try:
        module.run(name, mistake, memory.data_ptr(), out.data_ptr())
    finally:
        unwritten = control.forget_all()
    if unwritten:
        raise RuntimeError(f"{unwritten} was left unwritten")
    return out


@pytest.mark.parametrize("name", CAUGHT)
def test_the_mistake_is_caught(wrong: tuple[Any, Any], name: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=CAUGHT[name]):
            _run(wrong, name, True, seed)


@pytest.mark.parametrize("name", CAUGHT)
def test_the_right_twin_passes(wrong: tuple[Any, Any], name: str) -> None:
    results = [_run(wrong, name, False, seed) for seed in SEEDS]
    assert all(torch.equal(r, results[0]) for r in results)
    assert (results[0] >= 0).all()


def test_messages_name_the_kernel_thread_and_block(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"out_of_bounds_global: .* \(thread 63 of block 0\)"):
        _run(wrong, "out_of_bounds_global", True, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_fragments_of_tensor_cores(wrong: tuple[Any, Any], dtype: torch.dtype) -> None:
    module, control = wrong
    K = 32 if dtype == torch.int8 else 16
    a, b = (torch.randint(-60, 60, (rows, K)).to(dtype) for rows in (16, 8))
    d = torch.full((16, 8), -1, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    control.forget_all()
    for name, x, output in (("a", a, False), ("b", b, False), ("output", d, True)):
        control.allow(x.data_ptr(), x.numel() * x.itemsize, name, output)
    module.product(str(dtype).removeprefix("torch."), a.data_ptr(), b.data_ptr(), d.data_ptr())
    assert control.forget_all() == ""
    assert torch.equal(d.double(), a.double() @ b.double().T)  # small whole numbers: exact
