"""What the formula-level tests of methods share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effvlm.tokens import Tokens, apply

C = 12
Array = np.ndarray[Any, Any]


def rounded(x: float) -> int:
    return int(x + 0.5)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reduced(method: Any, x: Array, signals: dict[Any, torch.Tensor], **more: Any) -> Tokens:
    for step in method.steps():
        for need in step.do.needs:
            signals[need]  # made on demand, before plans copy what there is
    return apply(method, Tokens.of([torch.from_numpy(x)], signals=signals, **more))


def top(score: Array, k: int, among: list[int] | None = None) -> list[int]:
    among = list(range(len(score))) if among is None else among
    return sorted(sorted(among, key=lambda i: (-score[i], i))[:k])


def spread(among: list[int], k: int) -> list[int]:
    return [among[(j * len(among) + len(among) // 2) // k] for j in range(k)]


def assert_tokens(out: Tokens, kept: list[int], x: Array) -> None:
    assert out.position.tolist() == kept
    np.testing.assert_allclose(out.x.numpy(), x, rtol=1e-5, atol=1e-5)


def num(signal: torch.Tensor) -> Array:
    return signal.numpy().astype(np.float64)


def distances(x: Array) -> Array:
    flat = unit(x.astype(np.float64))
    return 1 - flat @ flat.T


def cosine(x: Array, i: int, j: int) -> float:
    return 1 - float(distances(x[[i, j]])[0, 1])
