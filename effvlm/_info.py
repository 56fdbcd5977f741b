"""``effvlm info``: what is there, what is not, and why."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effvlm import _core, _library

_LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda() -> tuple[str, list[str]]:
    """(why there is none, or empty; names of the devices)."""
    if not _core.cuda_version:
        return "built without CUDA: reinstall with nvcc on PATH (EFFVLM_CUDA=ON)", []
    if not torch.cuda.is_available():
        return "kernels are built in, but torch sees no CUDA device (a CPU build of torch, or no driver)", []
    return "", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def facts() -> dict[str, Any]:
    """Everything ``effvlm info`` shows, as plain data."""
    why, devices = _cuda()
    have = _core.cpu_isas()
    return {
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("effvlm", "torch", "transformers")},
        },
        "cpu": {
            "name": cpu_name(),
            "isa": _core.cpu_isa(),
            "supported": have,
            "not_supported": [level for level in _LEVELS if level not in have],
            "threads": torch.get_num_threads(),
            "openmp": "shared with torch" if _core.openmp_runtime() else "none found: kernels run on one thread",
        },
        "cuda": {"toolkit": _core.cuda_version, "architectures": _core.cuda_archs, "devices": devices, "why_not": why},
        "ops": sorted(_library.OPS),
    }


def print_facts(console: Console, found: dict[str, Any]) -> None:
    """The same as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, number in found["versions"].items():
        table.add_row(name, number)
    cpu, cuda = found["cpu"], found["cuda"]
    table.add_row("CPU", f"{cpu['name']}, {cpu['threads']} threads")
    missing = f" (this CPU has no {', '.join(cpu['not_supported'])})" if cpu["not_supported"] else ""
    table.add_row("CPU kernels", f"{cpu['isa']}{missing}")
    table.add_row("OpenMP", cpu["openmp"])
    built = f"CUDA {cuda['toolkit']} for {cuda['architectures']}" if cuda["toolkit"] else "no"
    table.add_row("CUDA kernels", built)
    table.add_row("CUDA devices", ", ".join(cuda["devices"]) or f"none: {cuda['why_not']}")
    table.add_row("ops", ", ".join(found["ops"]))
    console.print(table)
