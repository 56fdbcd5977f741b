"""The methods for videos against their formulae in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulae import Array, C, assert_tokens, cosine, reduced, rounded, top, unit

from effvlm import tokens as t
from effvlm.tokens import Tokens, apply

FRAMES, FH, FW = 6, 2, 3


@pytest.fixture(scope="module")
def film() -> tuple[Array, dict[str, Any]]:
    rng = np.random.default_rng(4)
    still = rng.normal(size=(1, FH * FW, C))
    x = still + rng.uniform(0, 0.8, size=(FRAMES, FH * FW, 1)) * rng.normal(size=(FRAMES, FH * FW, C))
    index = torch.arange(FRAMES * FH * FW)
    place = torch.stack([index // (FH * FW), index // FW % FH, index % FW], 1).int()
    return x.reshape(-1, C).astype(np.float32), {"place": place, "video": [True]}


def test_evs(film: Any) -> None:
    x, more = film
    P = FH * FW
    new = np.array([np.inf if i < P else 1 - cosine(x, i, i - P) for i in range(len(x))])
    for keep, k in ((0.5, 18), (0.01, 6)):  # never fewer than a frame
        assert_tokens(reduced(t.EVS(keep=keep), x, {}, **more), kept := top(new, k), x[kept])
    assert len(reduced(t.EVS(keep=0.1), x, {})) == len(x)  # a still image


def test_dycoke(film: Any) -> None:
    x, more = film
    P, kept = FH * FW, []
    for f in range(FRAMES):
        rows = list(range(f * P, f * P + P))
        back = 2 if f % 4 == 2 else 1
        if f % 4 == 0:
            kept += rows
        else:
            kept += top(np.array([1 - cosine(x, i, i - back * P) if i >= back * P else 9 for i in range(len(x))]), 2, rows)
    assert_tokens(reduced(t.DyCoke(keep=0.3), x, {}, **more), kept, x[kept])


def test_bvllm(film: Any) -> None:
    x, more = film
    frames = [(f, x.reshape(FRAMES, -1, C)[f].astype(np.float64), 1.0) for f in range(FRAMES)]
    while len(frames) > 2:
        r = min(len(frames) // 2, len(frames) - 2)
        mean = unit(np.stack([f[1].mean(0) for f in frames]))
        a, b = list(range(0, len(frames), 2)), list(range(1, len(frames), 2))
        score = mean[a] @ mean[b].T
        members: dict[int, list[int]] = {j: [j] for j in range(len(frames))}
        for i in sorted(range(len(a)), key=lambda i: (-score[i].max(), i))[:r]:
            members[b[int(score[i].argmax())]].append(a[i])
            del members[a[i]]
        frames = [
            (
                frames[m][0],
                sum(frames[k][1] * frames[k][2] for k in g) / sum(frames[k][2] for k in g),
                sum(frames[k][2] for k in g),
            )
            for m, g in sorted(members.items())
        ]
    out = reduced(t.BVLLM(keep=0.3), x, {}, **more)
    P = FH * FW
    assert_tokens(out, [f[0] * P + p for f in frames for p in range(P)], np.concatenate([f[1] for f in frames]))


def test_prunevid_merges_static_places_over_time() -> None:
    P = FH * FW
    rng = np.random.default_rng(6)
    scene = rng.normal(size=(2, P, C))
    x = scene[[0, 0, 0, 1, 1, 1]] + 0.01 * rng.normal(size=(6, P, C))
    x[1, 2] = rng.normal(size=C)  # one place that moves
    index = torch.arange(6 * P)
    place = torch.stack([index // P, index // FW % FH, index % FW], 1).int()
    more = {"place": place, "video": [True]}
    flat = x.reshape(-1, C).astype(np.float32)
    static = t.prunevid.Static(segments=0.34, threshold=0.8)
    out = static.plan(Tokens.of([torch.from_numpy(flat)], **more)).apply(Tokens.of([torch.from_numpy(flat)], **more))
    assert out.position.tolist() == [*range(P), P + 2, 2 * P + 2, *range(3 * P, 4 * P)]
    np.testing.assert_allclose(out.x[0], flat[[0, P, 2 * P]].mean(0), atol=1e-5)
    assert out.size.tolist() == [3, 3, 1, 3, 3, 3, 1, 1, *[3] * P]
    whole = apply(t.PruneVid(keep=0.5, segments=0.34), Tokens.of([torch.from_numpy(flat)], **more))
    assert whole.size.sum() == 6 * P
    assert whole.counts() == [3 + 1 + 1 + 3]


def test_lftr(film: Any) -> None:
    x, more = film
    P = FH * FW
    new = np.array([np.inf if i < P else 1 - cosine(x, i, i - P) for i in range(len(x))])
    left = top(new, rounded(len(x) * 0.25**0.5))
    like = np.full(len(x), np.inf)
    for f in range(FRAMES):
        rows = [i for i in left if i // P == f]
        pivots = top(np.linalg.norm(x, axis=1), 2, rows)
        for i in rows:
            like[i] = -1 if i in pivots else max(cosine(x, i, j) for j in pivots)
    assert_tokens(reduced(t.LFTR(keep=0.25, pivots=2), x, {}, **more), k := top(-like, rounded(len(x) * 0.25), left), x[k])
