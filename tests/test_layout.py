"""The repository's rules, executed. A rule that only stands in prose is forgotten."""

from __future__ import annotations

import ast
import platform
import re
import subprocess
from pathlib import Path

import pytest
from levels import AMX_FLAGS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
PYTHON = sorted(p for folder in ("effvlm", "tests", "bench") for p in (ROOT / folder).rglob("*.py"))
OPS = re.search(r"set\(EFFVLM_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text()).group(1).split()  # type: ignore[union-attr]
FIELDS = ("Math", "Shapes", "Layout", "Types", "Edges", "Order", "Parallel", "Cost", "Why so", "Not for")


def test_the_compiled_part_knows_neither_torch_nor_python() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r'#include [<"](torch|ATen|c10)/', text), f"{path}: torch header"
        assert path.name.startswith("bindings") or "pybind11" not in text, f"{path}: pybind11 belongs to bindings*"
        assert path.name == "launch.cuh" or "<<<" not in text, f"{path}: raw launch outside launch.cuh"


def test_kernels_use_no_raw_cuda_intrinsic() -> None:
    for path in (p for p in SOURCES if p.parent.name == "ops" and p.suffix == ".cu"):
        raw = re.findall(
            r"\b(__(?:shfl|ballot|any|all|match|reduce|ldg|ldcg|stcg)\w*|atomic[A-Z]\w*|asm\s*(?:volatile)?\s*\()",
            path.read_text(),
        )
        assert not raw, f"{path}: {raw} belong into csrc/core/cuda"


@pytest.mark.parametrize("op", OPS)
def test_every_row_is_complete(op: str) -> None:
    for name in (f"csrc/ops/{op}.h", f"csrc/ops/{op}_cpu.cpp", f"csrc/ops/{op}_cuda.cu", f"effvlm/ops/{op}.py",
                 f"tests/specs/{op}.py", f"tests/test_{op}.py"):  # fmt: skip
        assert (ROOT / name).is_file(), f"{op}: no {name}"
    assert any(f'm.def("{op}"' in p.read_text() for p in (ROOT / "csrc").glob("bindings*.cpp"))
    assert re.search(rf"from effvlm.ops.{op} import .*\b{op}\b", (ROOT / "effvlm/ops/__init__.py").read_text())
    comment = "\n".join(line for line in (ROOT / f"csrc/ops/{op}.h").read_text().splitlines() if line.startswith("//"))
    assert comment.startswith(f"// {op} — ")
    places = [comment.find(f"\n// {field} ") for field in FIELDS]
    assert min(places) > 0, f"{op}.h lacks {[f for f, p in zip(FIELDS, places, strict=True) if p < 0]}"
    assert places == sorted(places), f"{op}.h: fields are not in the order {FIELDS}"


def test_there_are_no_files_without_a_row() -> None:
    for path in (ROOT / "csrc/ops").iterdir():
        assert any(path.name == f"{op}.h" or path.name.startswith(f"{op}_") for op in OPS), f"{path}: belongs to no op"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def test_arrows_point_downward_only() -> None:
    forbidden = {
        "ops": ("effvlm.tokens", "effvlm.hf", "effvlm.demo", "transformers", "effvlm._core"),
        "tokens": ("effvlm.hf", "effvlm.demo", "transformers", "effvlm._core", "effvlm._library"),
        "hf": ("effvlm.demo", "effvlm.cli", "effvlm._core"),
        "experts": ("effvlm.demo", "effvlm.cli", "effvlm._core"),
        "demo": ("effvlm.cli", "effvlm._core"),
    }
    for layer, names in forbidden.items():
        for path in (ROOT / "effvlm" / layer).glob("*.py"):
            bad = [i for i in _imports(path) for n in names if i == n or i.startswith(n + ".")]
            assert not bad, f"{path} imports {bad}"


def test_files_and_functions_are_short() -> None:
    for path in SOURCES + PYTHON:
        assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"
    assert len((ROOT / "CMakeLists.txt").read_text().splitlines()) <= 100
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)  # type: ignore[operator]
                assert lines <= 40, f"{path}: {node.name} has {lines} lines"


def _function_lengths(text: str) -> list[tuple[str, int]]:
    """(first line, lines) of every C++ function, by its braces in formatted code."""
    found, start = [], None
    lines = text.splitlines()
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if (
            start is None
            and re.match(r"^(  )?\S.*\)( const| noexcept)* \{$", line)
            and not re.match(r"\s*(if|for|while|switch|else)\b", line)
        ):
            start = (i, indent)
        elif (start is not None and line.rstrip() in ("}", "};") and indent == 0) or (start and line == " " * start[1] + "}"):
            found.append((lines[start[0]].strip(), i - start[0] + 1))
            start = None
    return found


def test_cpp_functions_are_short() -> None:
    for path in SOURCES:
        for name, length in _function_lengths(path.read_text()):
            limit = 80 if "kernel(" in name else 42
            assert length <= limit, f"{path}: {name} has {length} lines, at most {limit}"


@pytest.mark.parametrize("op", OPS)
def test_isa_levels_share_no_symbols(op: str, tmp_path: Path) -> None:
    """The linker merges equal weak symbols, and would be free to keep a high level's copy for everyone."""
    if "avx512" not in AMX_FLAGS or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 machine")
    command = ["c++", "-std=c++17", "-O1", "-w", "-DEFFVLM_ISA=avx512", *AMX_FLAGS.split(), f"-I{ROOT / 'csrc'}", "-c"]
    subprocess.run([*command, str(ROOT / f"csrc/ops/{op}_cpu.cpp"), "-o", str(tmp_path / "op.o")], check=True)
    listing = subprocess.run(["nm", "-C", str(tmp_path / "op.o")], capture_output=True, text=True, check=True).stdout
    assert f" T effvlm::avx512::{op}_cpu" in listing
    shared = [line for line in listing.splitlines() if re.search(r" [WVuB] ", line) and "effvlm::avx512::" not in line]
    assert not shared, f"{op}: weak symbols outside the namespace of the level: {shared[:5]}"
