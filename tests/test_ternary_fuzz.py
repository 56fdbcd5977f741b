"""Damaged weights under AddressSanitizer and UndefinedBehaviorSanitizer: refused or multiplied, and never read outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from levels import ROOT, why_not
from specs.ternary_unpack import trits

from effvlm.ops import ternary_pack

ROUNDS = 10_000
SHAPES = ((70, 300, 0.885, 3), (64, 256, 0.99, 3), (130, 96, 0.5, 3), (70, 600, 0.8, 5), (64, 32, 0.97, 3), (65, 512, 0.3, 5))


def _flags(level: str) -> list[str]:
    """Those of CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = {name: body.split() for name, body in re.findall(r"set\(flags_(\w+) ([^)]*)\)", text)}

    def flat(words: list[str]) -> list[str]:
        return [flag for word in words for flag in (flat(found[word[8:-1]]) if word.startswith("${flags_") else [word])]

    return [flag for flag in flat(found.get(level, [])) if flag.startswith("-")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    named = []
    for i, (R, C, zeros, levels) in enumerate(SHAPES):
        w = ternary_pack(trits((1, R, C), zeros, levels, torch.Generator().manual_seed(i)), torch.ones(1, R), levels=levels)
        for part in ("data", "tiles", "base"):
            getattr(w, part).numpy().tofile(folder / f"{i}.{part}")
        named.append(f"{folder / str(i)}:{R}:{C}:{levels}")
    return named


@pytest.mark.skipif(sys.platform != "linux", reason="needs GCC or Clang on Linux")
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_damaged_weights_are_never_read_outside(level: str, weights: list[str], tmp_path: Path) -> None:
    if why := why_not(level):
        pytest.skip(why)
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=alignment,shift", "-fno-sanitize-recover=all"]
    command = ["c++", "-std=c++17", "-O1", "-g", "-w", *sanitize, *_flags(level), f"-DEFFVLM_ISA={level}", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "tests/fuzz/ternary_matmul.cpp", ROOT / "csrc/ops/ternary_matmul_cpu.cpp"]
    subprocess.run([*command, *map(str, sources), "-o", str(tmp_path / "fuzz")], check=True)
    done = subprocess.run([str(tmp_path / "fuzz"), str(ROUNDS), *weights], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    ran, refused = map(int, done.stdout.split())
    assert ran > ROUNDS // 10
    assert refused > ROUNDS // 3
