"""Every method against its formula, written once more in plain NumPy, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from effvlm import tokens as t
from effvlm.tokens import Tokens, apply
from effvlm.tokens.signals import Attention, Keys, Pixels, Text

H = W = 6
N, C, HEADS = H * W, 12, 4
Array = np.ndarray[Any, Any]


def _round(x: float) -> int:
    return int(x + 0.5)


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def signals() -> dict[Any, torch.Tensor]:
    g = torch.Generator().manual_seed(5)

    class Any_(dict[Any, torch.Tensor]):
        def __missing__(self, key: Any) -> torch.Tensor:
            shape = {Keys: (N, 10), Attention: (N,), Text: (N,), Pixels: (N,)}[type(key)]
            if isinstance(key, Attention) and key.heads == "none":
                shape = (N, HEADS)
            self[key] = torch.rand(shape, generator=g)
            return self[key]

        def __contains__(self, key: object) -> bool:
            return True

    return Any_()


@pytest.fixture(scope="module")
def image() -> Array:
    return np.random.default_rng(0).normal(size=(N, C)).astype(np.float32)


def _reduced(method: Any, x: Array, signals: dict[Any, torch.Tensor], **more: Any) -> Tokens:
    for step in method.steps():
        for need in step.do.needs:
            signals[need]  # made on demand, before plans copy what there is
    return apply(method, Tokens.of([torch.from_numpy(x)], signals=signals, **more))


def _top(score: Array, k: int, among: list[int] | None = None) -> list[int]:
    among = list(range(len(score))) if among is None else among
    return sorted(sorted(among, key=lambda i: (-score[i], i))[:k])


def _spread(among: list[int], k: int) -> list[int]:
    return [among[(j * len(among) + len(among) // 2) // k] for j in range(k)]


def _assert(out: Tokens, kept: list[int], x: Array) -> None:
    assert out.position.tolist() == kept
    np.testing.assert_allclose(out.x.numpy(), x, rtol=1e-5, atol=1e-5)


def _num(signal: torch.Tensor) -> Array:
    return signal.numpy().astype(np.float64)


def test_stride_and_random(image: Array, signals: Any) -> None:
    _assert(_reduced(t.Stride(keep=0.3), image, signals), k := _spread(list(range(N)), 11), image[k])
    first, again = (_reduced(t.Random(keep=0.3, seed=4), image, signals).position for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) == 11
    assert not torch.equal(first, _reduced(t.Random(keep=0.3, seed=5), image, signals).position)


@pytest.mark.parametrize("keep", [0.25, 1 / 9, 1 / 36, 0.5])
def test_pool(image: Array, signals: Any, keep: float) -> None:
    cells = _round(6 * keep**0.5)
    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(N):
        groups.setdefault((i // W * cells // H, i % W * cells // W), []).append(i)
    rows = sorted((members[len(members) // 2], members) for members in groups.values())
    out = _reduced(t.Pool(keep=keep), image, signals)
    _assert(out, [a for a, _ in rows], np.stack([image[m].mean(0) for _, m in rows]))


@pytest.mark.parametrize(("method", "weighted"), [(t.ToMe(keep=0.3), True), (t.AIM(keep=0.3), False)])
def test_tome_and_aim(image: Array, signals: Any, method: Any, weighted: bool) -> None:
    rows = [(i, image[i].astype(np.float64), 1.0) for i in range(N)]
    while len(rows) > 11:
        r = min(len(rows) // 2, len(rows) - 11)
        a, b = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
        score = _unit(np.stack([rows[i][1] for i in a])) @ _unit(np.stack([rows[j][1] for j in b])).T
        merged = sorted(range(len(a)), key=lambda i: (-score[i].max(), i))[:r]
        members: dict[int, list[int]] = {j: [j] for j in range(len(rows))}
        for i in merged:
            members[b[int(score[i].argmax())]].append(a[i])
            del members[a[i]]
        new = []
        for anchor, group in sorted(members.items()):
            weight = np.array([rows[k][2] if weighted else 1.0 for k in group])
            x = (np.stack([rows[k][1] for k in group]) * weight[:, None]).sum(0) / weight.sum()
            new.append((rows[anchor][0], x, sum(rows[k][2] for k in group)))
        rows = new
    out = _reduced(method, image, signals)
    _assert(out, [a for a, _, _ in rows], np.stack([x for _, x, _ in rows]))
    assert out.size.tolist() == [s for _, _, s in rows]


def test_fopru(image: Array, signals: Any) -> None:
    score = _num(signals[Attention(-2, "all")])
    _assert(_reduced(t.FoPru(keep=0.3), image, signals), k := _top(score, 11), image[k])
    rows = _top(score.reshape(H, W).sum(1), 2)
    k = [r * W + c for r in rows for c in range(W)]
    _assert(_reduced(t.FoPru(keep=0.3, strategy="row"), image, signals), k, image[k])


@pytest.mark.parametrize("release", [False, True])
def test_visionzip(image: Array, signals: Any, release: bool) -> None:
    score, keys = _num(signals[Attention(-2)]), _unit(_num(signals[Keys(-2)]))
    dominant = _top(score, _round(N * 0.3 * 54 / 64))
    rest = [i for i in range(N) if i not in dominant]
    targets = _spread(rest, 11 - len(dominant))
    joined: dict[int, list[int]] = {j: [] for j in targets}
    for i in rest:
        if i not in targets:
            joined[targets[int((keys[i] @ keys[targets].T).argmax())]].append(i)
    kept = sorted(dominant + targets)
    x = []
    for i in kept:
        others = image[joined.get(i, [])]
        if not len(others):
            x.append(image[i])
        elif release:
            x.append(image[i] + others.mean(0))
        else:
            x.append((image[i] + others.sum(0)) / (1 + len(others)))
    _assert(_reduced(t.VisionZip(keep=0.3, release=release), image, signals), kept, np.stack(x))


@pytest.mark.parametrize(("keep", "plus"), [(None, False), (0.2, False), (0.3, True)])
def test_prumerge(image: Array, signals: Any, keep: float | None, plus: bool) -> None:
    score, keys = _num(signals[Attention(-1)]).copy(), _unit(_num(signals[Keys(-1, "all")]))
    signals[Attention(-1)][[3, 17]] = 4.0  # outliers
    score[[3, 17]] = 4.0
    low, high = np.quantile(score, [0.25, 0.75])
    outliers = [i for i in range(N) if score[i] > high + 1.5 * (high - low)]
    picked = outliers if keep is None or plus else _top(score, _round(keep * N))
    if plus:
        rest = [i for i in range(N) if i not in picked]
        picked = sorted(picked + _spread(rest, _round(0.3 * N) - len(picked)))
    others = [i for i in range(N) if i not in picked]
    rows = []
    for i in picked:
        near = sorted(others, key=lambda j: -(keys[i] @ keys[j]))[:5]
        rows.append((i, image[i] + sum(score[j] * image[j] for j in near)))
    rows.append((others[int(score[others].argmax())], sum(score[j] * image[j] for j in others)))
    rows.sort(key=lambda row: row[0])
    out = _reduced(t.PruMerge(keep=keep, plus=plus, neighbours=5), image, signals)
    _assert(out, [i for i, _ in rows], np.stack([v for _, v in rows]))


@pytest.mark.parametrize("plus", [False, True])
def test_hiprune(image: Array, signals: Any, plus: bool) -> None:
    middle, late, text = (_num(signals[s]) for s in (Attention(0.375, "all"), Attention(-2, "all"), Text()))
    anchors = _top(middle, _round(N * 0.5 * 0.5 / 5))
    kept = set(anchors)
    for a in anchors:
        r, c = divmod(a, W)
        kept |= {(r + dr) * W + c + dc for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)) if 0 <= r + dr < H and 0 <= c + dc < W}
    for score, total in ((text, _round(N * 0.5 * 1.5 / 2)), (late, 18)) if plus else ((late, 18),):
        kept |= set(_top(score, max(0, total - len(kept)), [i for i in range(N) if i not in kept]))
    _assert(_reduced(t.HiPrune(keep=0.5, alpha=0.5, plus=plus), image, signals), k := sorted(kept), image[k])


def test_vscan(image: Array, signals: Any) -> None:
    shallow, late = _num(signals[Attention(0.21)]), _num(signals[Attention(-2)])
    kept: list[int] = []
    for r in range(0, H, 3):
        for c in range(0, W, 3):
            window = [i for i in range(N) if r <= i // W < r + 3 and c <= i % W < c + 3]
            kept += _top(shallow, _round(9 * 0.15), window)
    kept = sorted(kept + _top(late, 11 - len(kept), [i for i in range(N) if i not in kept]))
    unit = _unit(image.astype(np.float64))
    members = {k: [k] for k in kept}
    for i in range(N):
        if i not in members:
            members[kept[int((unit[i] @ unit[kept].T).argmax())]].append(i)
    x = np.stack([image[m].mean(0) for _, m in sorted(members.items())])
    _assert(_reduced(t.VScan(keep=0.3, window=3), image, signals), kept, x)


def test_mustdrop(image: Array, signals: Any) -> None:
    x = image.copy()
    x[[0, 1, 2, 6, 7, 8, 12, 13, 14]] = x[0] + 0.01 * np.random.default_rng(1).normal(size=(9, C)).astype(np.float32)
    score = _num(signals[Attention(-2)])
    left = [14] + [i for i in range(N) if i not in (0, 1, 2, 6, 7, 8, 12, 13, 14)]
    merged = x.copy()
    merged[14] = x[[0, 1, 2, 6, 7, 8, 12, 13, 14]].mean(0)
    _assert(_reduced(t.MustDrop(keep=0.5), x, signals), k := _top(score, 18, left), merged[k])
    everything = _reduced(t.MustDrop(keep=1.0), x, signals)
    assert everything.position.tolist() == sorted(left)
    assert everything.size[everything.position == 14].item() == 9


def _tiles() -> tuple[Array, torch.Tensor]:
    """A thumbnail of 3 × 3 and two tiles of 3 × 3 side by side, with a newline per row."""
    place = [(0, r, c) for r in range(3) for c in range(3)]
    for r in range(3):
        place += [(1 + c // 3, r, c) for c in range(6)] + [(0, -1, -1)]
    return np.random.default_rng(2).normal(size=(30, C)).astype(np.float32), torch.tensor(place, dtype=torch.int32)


def test_globalcom2() -> None:
    x, place = _tiles()
    score = np.random.default_rng(3).random(30)
    newline = (place[:, 1] < 0).numpy()
    score[newline] = 0
    thumb = torch.from_numpy(score[:9].reshape(1, 1, 3, 3))
    there = torch.nn.functional.interpolate(thumb, (3, 6), mode="bilinear")[0, 0].numpy()
    kept = _top(score, _round(9 * 0.5), list(range(9))) + [i for i in range(30) if newline[i]]
    tiles = {k: [i for i in range(30) if place[i, 0] == k and not newline[i]] for k in (1, 2)}
    sums = np.array([sum(there[place[i, 1], place[i, 2]] for i in tiles[k]) for k in (1, 2)])
    share = np.exp(sums / 10) / np.exp(sums / 10).sum()
    for k, part in zip((1, 2), share, strict=True):
        own = np.array([score[i] for i in tiles[k]])
        seen = np.array([there[place[i, 1], place[i, 2]] for i in tiles[k]])
        rank = own / np.linalg.norm(own) + seen / np.linalg.norm(seen)
        kept += [tiles[k][j] for j in _top(rank, _round(9 * min(1, 0.5 * (1 + part - share.mean()))))]
    signal = {Attention(-2): torch.from_numpy(score).float()}
    tokens = Tokens.of([torch.from_numpy(x)], place=place, protected=place[:, 1] < 0, signals=signal)
    assert apply(t.GlobalCom2(keep=0.5), tokens).position.tolist() == sorted(kept)


def _far(x: Array) -> Array:
    unit = _unit(x.astype(np.float64))
    return 1 - unit @ unit.T


def test_divprune(image: Array, signals: Any) -> None:
    distance = _far(image)
    alone = distance + np.diag(np.full(N, np.inf))
    kept = [int(alone.min(1).argmax())]
    while len(kept) < 11:
        nearest = distance[:, kept].min(1)
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    _assert(_reduced(t.DivPrune(keep=0.3), image, signals), k := sorted(kept), image[k])


def test_cdpruner(image: Array, signals: Any) -> None:
    relevance = _num(signals[Text()])
    for negate in (False, True):
        r = -relevance if negate else relevance
        r = (r - r.min()) / (r.max() - r.min())
        kernel = r[:, None] * (1 - _far(image)) * r
        kept: list[int] = []
        while len(kept) < 11:  # greedy: the largest determinant
            options = [i for i in range(N) if i not in kept]
            kept.append(max(options, key=lambda i: np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])])))
        out = _reduced(t.CDPruner(keep=0.3, negate=negate), image, signals)
        assert out.position.tolist() == sorted(kept)


def test_dart(image: Array, signals: Any) -> None:
    pivots = _top(np.linalg.norm(image, axis=1), 4)
    like = (1 - _far(image))[:, pivots].max(1)
    like[pivots] = -1
    _assert(_reduced(t.DART(keep=0.3, pivots=4), image, signals), k := _top(-like, 11), image[k])


FRAMES, FH, FW = 6, 2, 3


@pytest.fixture(scope="module")
def film() -> tuple[Array, dict[str, Any]]:
    rng = np.random.default_rng(4)
    still = rng.normal(size=(1, FH * FW, C))
    x = still + rng.uniform(0, 0.8, size=(FRAMES, FH * FW, 1)) * rng.normal(size=(FRAMES, FH * FW, C))
    index = torch.arange(FRAMES * FH * FW)
    place = torch.stack([index // (FH * FW), index // FW % FH, index % FW], 1).int()
    return x.reshape(-1, C).astype(np.float32), {"place": place, "video": [True]}


def _cos(x: Array, i: int, j: int) -> float:
    return 1 - float(_far(x[[i, j]])[0, 1])


def test_evs(film: Any) -> None:
    x, more = film
    P = FH * FW
    new = np.array([np.inf if i < P else 1 - _cos(x, i, i - P) for i in range(len(x))])
    for keep, k in ((0.5, 18), (0.01, 6)):  # never fewer than a frame
        _assert(_reduced(t.EVS(keep=keep), x, {}, **more), kept := _top(new, k), x[kept])
    assert len(_reduced(t.EVS(keep=0.1), x, {})) == len(x)  # a still image


def test_dycoke(film: Any) -> None:
    x, more = film
    P, kept = FH * FW, []
    for f in range(FRAMES):
        rows = list(range(f * P, f * P + P))
        back = 2 if f % 4 == 2 else 1
        if f % 4 == 0:
            kept += rows
        else:
            kept += _top(np.array([1 - _cos(x, i, i - back * P) if i >= back * P else 9 for i in range(len(x))]), 2, rows)
    _assert(_reduced(t.DyCoke(keep=0.3), x, {}, **more), kept, x[kept])


def test_bvllm(film: Any) -> None:
    x, more = film
    frames = [(f, x.reshape(FRAMES, -1, C)[f].astype(np.float64), 1.0) for f in range(FRAMES)]
    while len(frames) > 2:
        r = min(len(frames) // 2, len(frames) - 2)
        mean = _unit(np.stack([f[1].mean(0) for f in frames]))
        a, b = list(range(0, len(frames), 2)), list(range(1, len(frames), 2))
        score = mean[a] @ mean[b].T
        members: dict[int, list[int]] = {j: [j] for j in range(len(frames))}
        for i in sorted(range(len(a)), key=lambda i: (-score[i].max(), i))[:r]:
            members[b[int(score[i].argmax())]].append(a[i])
            del members[a[i]]
        frames = [
            (frames[m][0], sum(frames[k][1] * frames[k][2] for k in g) / sum(frames[k][2] for k in g), sum(frames[k][2] for k in g))
            for m, g in sorted(members.items())
        ]
    out = _reduced(t.BVLLM(keep=0.3), x, {}, **more)
    P = FH * FW
    _assert(out, [f[0] * P + p for f in frames for p in range(P)], np.concatenate([f[1] for f in frames]))


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


def test_lftr(film: Any, image: Array, signals: Any) -> None:
    x, more = film
    P = FH * FW
    new = np.array([np.inf if i < P else 1 - _cos(x, i, i - P) for i in range(len(x))])
    left = _top(new, _round(len(x) * 0.25**0.5))
    like = np.full(len(x), np.inf)
    for f in range(FRAMES):
        rows = [i for i in left if i // P == f]
        pivots = _top(np.linalg.norm(x, axis=1), 2, rows)
        for i in rows:
            like[i] = -1 if i in pivots else max(_cos(x, i, j) for j in pivots)
    _assert(_reduced(t.LFTR(keep=0.25, pivots=2), x, {}, **more), k := _top(-like, _round(len(x) * 0.25), left), x[k])


def test_semclip() -> None:
    x, place = _tiles()
    text = np.random.default_rng(7).random(30)
    mean = [np.mean([text[i] for i in range(30) if place[i, 0] == k and place[i, 1] >= 0]) for k in (1, 2)]
    best = 1 + int(np.argmax(mean))
    kept = [i for i in range(30) if place[i, 0] in (0, best)]
    tokens = Tokens.of([torch.from_numpy(x)], place=place, protected=place[:, 1] < 0, signals={Text(): torch.from_numpy(text)})
    assert apply(t.SemClip(keep=0.5), tokens).position.tolist() == kept
    assert len(apply(t.SemClip(keep=0.01), tokens)) == 12


@pytest.mark.parametrize(("keep", "top_p"), [(1.0, 0.5), (0.1, 0.9)])
def test_slime(image: Array, signals: Any, keep: float, top_p: float) -> None:
    text = _num(signals[Text()])
    p = np.exp(text / 0.3) / np.exp(text / 0.3).sum()
    order = sorted(range(N), key=lambda i: (-p[i], i))
    likely = order[: int((np.cumsum(p[order]) < top_p).sum()) + 1]
    kept = sorted(likely[: max(1, _round(keep * N))])
    _assert(_reduced(t.SliME(keep=keep, top_p=top_p, tau=0.3), image, signals), kept, image[kept])


def test_acformer(image: Array, signals: Any) -> None:
    heads = _num(signals[Attention(-2, "cls", "none")])
    chosen: list[int] = []
    while len(chosen) < 11:
        head = len(chosen) % HEADS
        chosen.append(max((i for i in range(N) if i not in chosen), key=lambda i: heads[i, head]))
    unit = _unit(image.astype(np.float64))
    members = {k: [k] for k in sorted(chosen)}
    for i in range(N):
        if i not in chosen:
            members[sorted(chosen)[int((unit[i] @ unit[sorted(chosen)].T).argmax())]].append(i)
    _assert(_reduced(t.AcFormer(keep=0.3), image, signals), sorted(chosen), np.stack([image[m].mean(0) for m in members.values()]))


def test_pixelprune(image: Array) -> None:
    difference = torch.full((N,), 0.5)
    difference[[4, 9]] = 0
    difference[0] = torch.inf
    out = _reduced(t.PixelPrune(), image, {Pixels(): difference})
    assert out.position.tolist() == [i for i in range(N) if i not in (4, 9)]




def test_every_method_is_tested_here() -> None:
    text = __import__("pathlib").Path(__file__).read_text()
    for method in t.METHODS:
        assert f"t.{method.__name__}(" in text, f"{method.__name__} has no reference here"
