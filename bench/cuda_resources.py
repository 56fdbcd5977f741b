"""What every CUDA kernel takes on every architecture: ``python bench/cuda_resources.py --save`` (needs nvcc, no GPU).

The table under bench/results/ is what ``tests/test_cuda_compile.py`` holds the kernels to: run this with ``--save`` after a
change that is worth a spill or a larger stack frame, and say why in the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "bench/results/cuda_resources.json"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_\w+'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")

Kernels = dict[str, dict[str, int]]


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def sources() -> list[Path]:
    """Every kernel file; one whose name ends in _sm90.cu is for 90a alone."""
    return sorted((ROOT / "csrc/ops").glob("*.cu"))


def _demangle(name: str) -> str:
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|effvlm::|^void ", "", plain).split("(")[0]


def parse(text: str) -> Kernels:
    """Kernel → registers, shared, stack, spills (bytes but for registers), from what ``nvcc --resource-usage`` prints."""
    kernels: Kernels = {}
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        entry, stack, used = _ENTRY.search(block), _STACK.search(block), _USED.search(block)
        if not (entry and stack and used):
            continue
        shared = _SHARED.search(block)
        kernels[_demangle(entry[1])] = {
            "registers": int(used[1]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(stack[1]),
            "spills": int(stack[2]) + int(stack[3]),
        }
    return kernels


def compile_one(source: Path, architecture: str) -> Kernels:
    """Compile one file for one architecture with warnings as errors.

    Raises:
        RuntimeError: no nvcc, or a warning or error, with the compiler's text.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("cuda_resources: expected nvcc on PATH, found none")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            compiler,
            "-cubin",
            f"-arch=sm_{architecture}",
            "-std=c++17",
            "-O3",
            "--resource-usage",
            "-Werror",
            "all-warnings",
        ]
        command += ["-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc'}", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{architecture}:\n{done.stdout}{done.stderr}")
    found = parse(done.stdout + done.stderr)
    if not found:
        raise RuntimeError(f"{source.name} for sm_{architecture}: the compiler named no kernel")
    return found


def measure() -> dict[str, Any]:
    """``nvcc`` (its version) and ``kernels``: file → kernel → architecture → what it takes."""
    jobs = [(s, a) for s in sources() for a in ARCHITECTURES if not s.stem.endswith("_sm90") or a == "90a"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_one(*job), jobs))
    kernels: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for (source, architecture), found in zip(jobs, results, strict=True):
        for name, taken in sorted(found.items()):
            kernels.setdefault(source.name, {}).setdefault(name, {})[f"sm_{architecture}"] = taken
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    return {"nvcc": release[1] if release else "unknown", "kernels": kernels}


def markdown(measured: dict[str, Any]) -> str:
    """The same as a table: registers, with shared memory, stack and spills where there are any."""
    lines = [
        "# What each CUDA kernel takes",
        "",
        f"nvcc {measured['nvcc']}; registers per thread · bytes of static shared memory per block; stack and spills in bytes.",
        "Written by `python bench/cuda_resources.py --save`; `tests/test_cuda_compile.py` fails when a kernel exceeds it.",
        "",
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|" + "---|" * len(ARCHITECTURES),
    ]
    for kernels in measured["kernels"].values():
        for name, by_architecture in kernels.items():
            cells = []
            for a in ARCHITECTURES:
                taken = by_architecture.get(f"sm_{a}")
                extra = "" if not taken else "".join(f" · {k} {taken[k]}" for k in ("stack", "spills") if taken[k])
                cells.append(f"{taken['registers']} · {taken['shared']}{extra}" if taken else "–")
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="replace the table under bench/results/")
    measured = measure()
    if parser.parse_args().save:
        TABLE.write_text(json.dumps(measured, indent=1) + "\n")
        TABLE.with_suffix(".md").write_text(markdown(measured))
    print(markdown(measured))


if __name__ == "__main__":
    main()
