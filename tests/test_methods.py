"""Every method against its formula, written once more in plain NumPy, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formulae import Array, C, assert_tokens, distances, num, reduced, rounded, spread, top, unit

from effvlm import tokens as t
from effvlm.tokens import Tokens, apply
from effvlm.tokens.signals import Attention, Keys, Pixels, Text

H = W = 6
N, HEADS = H * W, 4


@pytest.fixture(scope="module")
def signals() -> dict[Any, torch.Tensor]:
    g = torch.Generator().manual_seed(5)

    class OnDemand(dict[Any, torch.Tensor]):
        def __missing__(self, key: Any) -> torch.Tensor:
            shape = {Keys: (N, 10), Attention: (N,), Text: (N,), Pixels: (N,)}[type(key)]
            if isinstance(key, Attention) and key.heads == "none":
                shape = (N, HEADS)
            self[key] = torch.rand(shape, generator=g)
            return self[key]

        def __contains__(self, key: object) -> bool:
            return True

    return OnDemand()


@pytest.fixture(scope="module")
def image() -> Array:
    return np.random.default_rng(0).normal(size=(N, C)).astype(np.float32)


def test_stride_and_random(image: Array, signals: Any) -> None:
    assert_tokens(reduced(t.Stride(keep=0.3), image, signals), k := spread(list(range(N)), 11), image[k])
    first, again = (reduced(t.Random(keep=0.3, seed=4), image, signals).position for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) == 11
    assert not torch.equal(first, reduced(t.Random(keep=0.3, seed=5), image, signals).position)


@pytest.mark.parametrize("keep", [0.25, 1 / 9, 1 / 36, 0.5])
def test_pool(image: Array, signals: Any, keep: float) -> None:
    cells = rounded(6 * keep**0.5)
    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(N):
        groups.setdefault((i // W * cells // H, i % W * cells // W), []).append(i)
    rows = sorted((members[len(members) // 2], members) for members in groups.values())
    out = reduced(t.Pool(keep=keep), image, signals)
    assert_tokens(out, [a for a, _ in rows], np.stack([image[m].mean(0) for _, m in rows]))


@pytest.mark.parametrize(("method", "weighted"), [(t.ToMe(keep=0.3), True), (t.AIM(keep=0.3), False)])
def test_tome_and_aim(image: Array, signals: Any, method: Any, weighted: bool) -> None:
    rows = [(i, image[i].astype(np.float64), 1.0) for i in range(N)]
    while len(rows) > 11:
        r = min(len(rows) // 2, len(rows) - 11)
        a, b = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
        score = unit(np.stack([rows[i][1] for i in a])) @ unit(np.stack([rows[j][1] for j in b])).T
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
    out = reduced(method, image, signals)
    assert_tokens(out, [a for a, _, _ in rows], np.stack([x for _, x, _ in rows]))
    assert out.size.tolist() == [s for _, _, s in rows]


def test_fopru(image: Array, signals: Any) -> None:
    score = num(signals[Attention(-2, "all")])
    assert_tokens(reduced(t.FoPru(keep=0.3), image, signals), k := top(score, 11), image[k])
    rows = top(score.reshape(H, W).sum(1), 2)
    k = [r * W + c for r in rows for c in range(W)]
    assert_tokens(reduced(t.FoPru(keep=0.3, strategy="row"), image, signals), k, image[k])


@pytest.mark.parametrize("release", [False, True])
def test_visionzip(image: Array, signals: Any, release: bool) -> None:
    score, keys = num(signals[Attention(-2)]), unit(num(signals[Keys(-2)]))
    dominant = top(score, rounded(N * 0.3 * 54 / 64))
    rest = [i for i in range(N) if i not in dominant]
    targets = spread(rest, 11 - len(dominant))
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
    assert_tokens(reduced(t.VisionZip(keep=0.3, release=release), image, signals), kept, np.stack(x))


@pytest.mark.parametrize(("keep", "plus"), [(None, False), (0.2, False), (0.3, True)])
def test_prumerge(image: Array, signals: Any, keep: float | None, plus: bool) -> None:
    score, keys = num(signals[Attention(-1)]).copy(), unit(num(signals[Keys(-1, "all")]))
    signals[Attention(-1)][[3, 17]] = 4.0  # outliers
    score[[3, 17]] = 4.0
    low, high = np.quantile(score, [0.25, 0.75])
    outliers = [i for i in range(N) if score[i] > high + 1.5 * (high - low)]
    picked = outliers if keep is None or plus else top(score, rounded(keep * N))
    if plus:
        rest = [i for i in range(N) if i not in picked]
        picked = sorted(picked + spread(rest, rounded(0.3 * N) - len(picked)))
    others = [i for i in range(N) if i not in picked]
    rows = []
    for i in picked:
        near = sorted(others, key=lambda j: -(keys[i] @ keys[j]))[:5]
        rows.append((i, image[i] + sum(score[j] * image[j] for j in near)))
    rows.append((others[int(score[others].argmax())], sum(score[j] * image[j] for j in others)))
    rows.sort(key=lambda row: row[0])
    out = reduced(t.PruMerge(keep=keep, plus=plus, neighbours=5), image, signals)
    assert_tokens(out, [i for i, _ in rows], np.stack([v for _, v in rows]))


@pytest.mark.parametrize("plus", [False, True])
def test_hiprune(image: Array, signals: Any, plus: bool) -> None:
    middle, late, text = (num(signals[s]) for s in (Attention(0.375, "all"), Attention(-2, "all"), Text()))
    anchors = top(middle, rounded(N * 0.5 * 0.5 / 5))
    kept = set(anchors)
    for a in anchors:
        r, c = divmod(a, W)
        kept |= {(r + dr) * W + c + dc for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)) if 0 <= r + dr < H and 0 <= c + dc < W}
    for score, total in ((text, rounded(N * 0.5 * 1.5 / 2)), (late, 18)) if plus else ((late, 18),):
        kept |= set(top(score, max(0, total - len(kept)), [i for i in range(N) if i not in kept]))
    assert_tokens(reduced(t.HiPrune(keep=0.5, alpha=0.5, plus=plus), image, signals), k := sorted(kept), image[k])


def test_vscan(image: Array, signals: Any) -> None:
    shallow, late = num(signals[Attention(0.21)]), num(signals[Attention(-2)])
    kept: list[int] = []
    for r in range(0, H, 3):
        for c in range(0, W, 3):
            window = [i for i in range(N) if r <= i // W < r + 3 and c <= i % W < c + 3]
            kept += top(shallow, rounded(9 * 0.15), window)
    kept = sorted(kept + top(late, 11 - len(kept), [i for i in range(N) if i not in kept]))
    flat = unit(image.astype(np.float64))
    members = {k: [k] for k in kept}
    for i in range(N):
        if i not in members:
            members[kept[int((flat[i] @ flat[kept].T).argmax())]].append(i)
    x = np.stack([image[m].mean(0) for _, m in sorted(members.items())])
    assert_tokens(reduced(t.VScan(keep=0.3, window=3), image, signals), kept, x)


def test_mustdrop(image: Array, signals: Any) -> None:
    x = image.copy()
    x[[0, 1, 2, 6, 7, 8, 12, 13, 14]] = x[0] + 0.01 * np.random.default_rng(1).normal(size=(9, C)).astype(np.float32)
    score = num(signals[Attention(-2)])
    left = [14] + [i for i in range(N) if i not in (0, 1, 2, 6, 7, 8, 12, 13, 14)]
    merged = x.copy()
    merged[14] = x[[0, 1, 2, 6, 7, 8, 12, 13, 14]].mean(0)
    assert_tokens(reduced(t.MustDrop(keep=0.5), x, signals), k := top(score, 18, left), merged[k])
    everything = reduced(t.MustDrop(keep=1.0), x, signals)
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
    kept = top(score, rounded(9 * 0.5), list(range(9))) + [i for i in range(30) if newline[i]]
    tiles = {k: [i for i in range(30) if place[i, 0] == k and not newline[i]] for k in (1, 2)}
    sums = np.array([sum(there[place[i, 1], place[i, 2]] for i in tiles[k]) for k in (1, 2)])
    share = np.exp(sums / 10) / np.exp(sums / 10).sum()
    for k, part in zip((1, 2), share, strict=True):
        own = np.array([score[i] for i in tiles[k]])
        seen = np.array([there[place[i, 1], place[i, 2]] for i in tiles[k]])
        rank = own / np.linalg.norm(own) + seen / np.linalg.norm(seen)
        kept += [tiles[k][j] for j in top(rank, rounded(9 * min(1, 0.5 * (1 + part - share.mean()))))]
    signal = {Attention(-2): torch.from_numpy(score).float()}
    tokens = Tokens.of([torch.from_numpy(x)], place=place, protected=place[:, 1] < 0, signals=signal)
    assert apply(t.GlobalCom2(keep=0.5), tokens).position.tolist() == sorted(kept)


def test_divprune(image: Array, signals: Any) -> None:
    distance = distances(image)
    alone = distance + np.diag(np.full(N, np.inf))
    kept = [int(alone.min(1).argmax())]
    while len(kept) < 11:
        nearest = distance[:, kept].min(1)
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    assert_tokens(reduced(t.DivPrune(keep=0.3), image, signals), k := sorted(kept), image[k])


def test_cdpruner(image: Array, signals: Any) -> None:
    relevance = num(signals[Text()])
    for negate in (False, True):
        r = -relevance if negate else relevance
        r = (r - r.min()) / (r.max() - r.min())
        kernel = r[:, None] * (1 - distances(image)) * r
        kept: list[int] = []
        while len(kept) < 11:  # greedy: the largest determinant
            options = [i for i in range(N) if i not in kept]
            kept.append(max(options, key=lambda i: np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])])))
        out = reduced(t.CDPruner(keep=0.3, negate=negate), image, signals)
        assert out.position.tolist() == sorted(kept)


def test_dart(image: Array, signals: Any) -> None:
    pivots = top(np.linalg.norm(image, axis=1), 4)
    like = (1 - distances(image))[:, pivots].max(1)
    like[pivots] = -1
    assert_tokens(reduced(t.DART(keep=0.3, pivots=4), image, signals), k := top(-like, 11), image[k])


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
    text = num(signals[Text()])
    p = np.exp(text / 0.3) / np.exp(text / 0.3).sum()
    order = sorted(range(N), key=lambda i: (-p[i], i))
    likely = order[: int((np.cumsum(p[order]) < top_p).sum()) + 1]
    kept = sorted(likely[: max(1, rounded(keep * N))])
    assert_tokens(reduced(t.SliME(keep=keep, top_p=top_p, tau=0.3), image, signals), kept, image[kept])


def test_acformer(image: Array, signals: Any) -> None:
    heads = num(signals[Attention(-2, "cls", "none")])
    chosen: list[int] = []
    while len(chosen) < 11:
        head = len(chosen) % HEADS
        chosen.append(max((i for i in range(N) if i not in chosen), key=lambda i: heads[i, head]))
    flat = unit(image.astype(np.float64))
    members = {k: [k] for k in sorted(chosen)}
    for i in range(N):
        if i not in chosen:
            members[sorted(chosen)[int((flat[i] @ flat[sorted(chosen)].T).argmax())]].append(i)
    assert_tokens(
        reduced(t.AcFormer(keep=0.3), image, signals), sorted(chosen), np.stack([image[m].mean(0) for m in members.values()])
    )


def test_pixelprune(image: Array) -> None:
    difference = torch.full((N,), 0.5)
    difference[[4, 9]] = 0
    difference[0] = torch.inf
    out = reduced(t.PixelPrune(), image, {Pixels(): difference})
    assert out.position.tolist() == [i for i in range(N) if i not in (4, 9)]


def test_every_method_is_tested_here() -> None:
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*methods.py"))
    for method in t.METHODS:
        assert f"t.{method.__name__}(" in text, f"{method.__name__} has no reference"
