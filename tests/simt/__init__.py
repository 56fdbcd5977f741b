"""The CUDA kernels on the host: builds csrc/ against simt.h and runs it in place of effvlm._core. See README.md here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from effvlm import _library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _objects(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """Object files; several sources are compiled at a time."""
    objects = [folder / f"{source.stem}{source.suffix}.o" for source in sources]
    running: list[tuple[subprocess.Popen[str], list[str]]] = []
    for source, target in zip(sources, objects, strict=True):
        command = ["c++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        running.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), command))
        if len(running) == (os.cpu_count() or 1) or source == sources[-1]:
            for process, run in running:
                if process.wait():
                    raise RuntimeError(f"{' '.join(run)}\n{process.stderr.read() if process.stderr else ''}")
            running = []
    return objects


def build(kernels: list[Path], bindings: list[Path], name: str, scalar: Sequence[Path] = ()) -> ModuleType:
    """A Python module of the emulator, ``kernels`` (instrumented) and ``bindings``; kept in the cache of this machine's user.

    ``scalar`` are CPU kernels, linked in because the bindings name them, but never called.

    Set ``EFFVLM_SIMT_FLAGS="-O0 -g"`` to step through kernels in gdb.
    """
    import pybind11

    includes = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fPIC", "-g", "-w", "-pthread", "-DEFFVLM_SIMT", "-DEFFVLM_WITH_CUDA=1", "-DEFFVLM_ONLY_LEVEL=scalar"]
    flags += ["-D__host__=", "-D__device__="]  # core/gap_planes.h is for both sides, and host files do not include simt.h
    flags += ['-DEFFVLM_CUDA_VERSION="emulated"', '-DEFFVLM_CUDA_ARCHS="emulated"', *(f"-I{i}" for i in includes)]
    flags += os.environ.get("EFFVLM_SIMT_FLAGS", "-O1").split()
    everything = sorted({*HERE.glob("*.[hc]*"), *(ROOT / "csrc").rglob("*.*"), *kernels, *bindings})
    key = hashlib.sha256(b"".join(p.read_bytes() for p in everything) + " ".join(flags).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"effvlm-simt-{os.getuid()}" / f"{name}-{key}"
    target = folder / f"{name}{EXTENSION_SUFFIXES[0]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = _objects(kernels, folder, [*flags, "-fsanitize=thread"])
        objects += _objects([*sorted(HERE.glob("simt*.cpp")), *bindings], folder, flags)
        objects += _objects([*scalar], folder, [*flags, "-DEFFVLM_ISA=scalar"])
        _compile(["c++", "-shared", "-pthread", *map(str, objects), "-o", str(target) + ".new", "-ldl"])
        os.replace(str(target) + ".new", target)
    return load_extension(name, target)


def load_extension(name: str, path: Path) -> ModuleType:
    """The module ``name`` (as in ``PyInit_name``) of a file, under a full name of its own: pybind11 keeps one module per name."""
    spec = spec_from_file_location(f"{path.parent.name}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulated:
    """Stands in for ``effvlm._core``: every op it has runs the CUDA source on host tensors, checked access by access."""

    def __init__(self, core: Any, control: Any) -> None:
        self._core, self._control = core, control

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)
        if name.endswith("_workspace"):
            return function
        inputs = len(getattr(torch.ops.effvlm, name).default._schema.arguments)
        op = _library.OPS[name]

        def call(*args: Any) -> None:
            kinds = [f"input {i}" if i < inputs else f"output {i - inputs}" for i in range(len(args))]
            kinds = [f"in place {i}" if i in op.mutates else kind for i, kind in enumerate(kinds)]
            if op.needs_workspace:
                kinds[-2] = "workspace"
            self._control.forget_all()
            for kind, view in zip(kinds[:-1], args[:-1], strict=True):
                if isinstance(view, tuple):
                    self._control.allow(*_extent(view), kind, not kind.startswith("input"))
            function(*args)
            unwritten = self._control.forget_all()
            if unwritten:
                raise RuntimeError(f"{name}: {unwritten} was left unwritten, at least in part")

        return call


def _extent(view: tuple[Any, ...]) -> tuple[int, int]:
    """(first address, bytes) that a view may touch."""
    address, shape, stride, code, _ = view
    size = {0: 4, 1: 2, 2: 2, 3: 4, 4: 8, 5: 1, 6: 1, 7: 1, 8: 8, 9: 4}[code]
    if 0 in shape:
        return address, 0
    return address, size * (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))


@cache
def load() -> Emulated:
    """The module for ``effvlm._library.backend("compiled", host_core=…)``."""
    ops = ROOT / "csrc/ops"
    cuda = sorted(p for p in ops.glob("*_cuda.cu"))
    core = ("check", "gap_planes_pack", "gap_planes_validate", "cpu/isa", "cpu/parallel")
    host = [*sorted((ROOT / "csrc").glob("bindings*.cpp")), *(ROOT / f"csrc/core/{name}.cpp" for name in core)]
    cpu = sorted(ops.glob("*_cpu.cpp"))
    os.environ.setdefault("EFFVLM_SIMT_FLAGS", "-O1")
    module = build(cuda, host, "_core", scalar=cpu)
    return Emulated(module, load_extension("_simt_control", Path(str(module.__file__))))
