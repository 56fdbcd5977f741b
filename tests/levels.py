"""Where the conformance suite runs an op: every ISA level of this machine, emulated AMX, emulated CUDA, a GPU if there is one."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import simt
import torch

import effvlm
from effvlm import _core, _library

ROOT = Path(__file__).parents[1]
LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_emulated", "simt", "cuda")
AMX_FLAGS = (
    "-mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512vbmi -mavx512vbmi2 -mavx512bf16"
)


def why_not(level: str) -> str:
    """Why a level cannot run here; empty when it can."""
    if level == "cuda":
        return "" if torch.cuda.is_available() and _core.cuda_version else "no CUDA device, or built without CUDA"
    if level == "simt":
        return (
            ""
            if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
            else "the CUDA emulator needs Linux on x86-64"
        )
    needed = "avx512_bf16" if level == "amx_emulated" else level
    return "" if needed in _core.cpu_isas() else f"this machine has no {needed}"


@cache
def amx_emulated() -> ModuleType:
    """effvlm._core with the AMX sources as its only CPU level, and the tile instructions emulated (csrc/core/cpu/amx.h)."""
    import pybind11

    ops = [word.removesuffix("_cpu.cpp") for word in sorted(p.name for p in (ROOT / "csrc/ops").glob("*_cpu.cpp"))]
    sources = [
        "bindings.cpp",
        "bindings_scans.cpp",
        "bindings_tokens.cpp",
        "core/check.cpp",
        "core/gap_planes_pack.cpp",
        "core/gap_planes_validate.cpp",
        "core/cpu/isa.cpp",
        "core/cpu/parallel.cpp",
        *(f"ops/{op}_cpu.cpp" for op in ops),
    ]
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-w", *AMX_FLAGS.split()]
    command += ["-DEFFVLM_ISA=amx", "-DEFFVLM_ONLY_LEVEL=amx", "-DEFFVLM_EMULATE_AMX", *(f"-I{i}" for i in includes)]
    with tempfile.TemporaryDirectory(prefix="effvlm-amx-") as folder:  # once loaded, the file itself is no longer needed
        out = Path(folder) / f"_core{EXTENSION_SUFFIXES[0]}"
        subprocess.run([*command, *(str(ROOT / "csrc" / s) for s in sources), "-o", str(out), "-ldl"], check=True)
        return simt.load_extension("_core", out)


@contextlib.contextmanager
def at(level: str) -> Iterator[torch.device]:
    """Ops run at ``level`` inside the block, on tensors of the device that it yields."""
    if level == "cuda":
        yield torch.device("cuda", 0)
        return
    before = _core.cpu_isa()
    try:
        if level in ("amx_emulated", "simt"):
            core = amx_emulated() if level == "amx_emulated" else simt.load()
            with _library.backend("compiled", host_core=core):
                yield torch.device("cpu")
        else:
            effvlm.set_cpu_isa(level)
            yield torch.device("cpu")
    finally:
        effvlm.set_cpu_isa(before)
