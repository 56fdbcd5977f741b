"""Tokens, plans, groups and picks; recipes in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effvlm.tokens import (
    METHODS,
    DivPrune,
    PixelPrune,
    Plan,
    Random,
    Recipe,
    Select,
    Step,
    Stride,
    Tokens,
    ToMe,
    VisionZip,
    apply,
)
from effvlm.tokens.budgets import Count, FillTo, Keep, kept
from effvlm.tokens.groups import Crop, Image, Segments, Window
from effvlm.tokens.merges import Bipartite, density_peaks
from effvlm.tokens.picks import Around, Every, Top, Union
from effvlm.tokens.scores import Chance, Novelty, previous


@pytest.mark.parametrize("method", [ToMe, Stride, Random, DivPrune])
@pytest.mark.parametrize("N", [1, 2, 3, 9, 144, 577])
def test_counts_order_and_sizes(method: type, N: int) -> None:
    x = torch.randn(2, N, 24)
    for keep in (0.001, 0.1, 0.25, 0.5, 0.77, 1.0):
        out = apply(method(keep=keep), Tokens.of(x))
        M = kept(keep, N)
        assert out.x.shape == (2 * M, 24)
        assert out.start == (0, M, 2 * M)
        assert (out.position.diff() > 0).all()
        assert torch.equal(out.image(), out.position // N)
        if method is ToMe:
            assert out.size.sum() == 2 * N
            mean = (out.x * out.size[:, None]).view(2, M, 24).sum(1) / N
            assert torch.allclose(mean, x.mean(1), atol=1e-5)


@pytest.mark.parametrize("method", [ToMe, Stride, Random])
def test_keeping_all_changes_nothing(method: type) -> None:
    tokens = Tokens.of(torch.randn(1, 20, 8))
    assert apply(method(keep=1.0), tokens).x is tokens.x


def test_images_of_different_sizes_share_nothing() -> None:
    parts = [torch.randn(n, 16) for n in (7, 30, 1, 64)]
    for method in (ToMe(keep=0.3), Stride(keep=0.3), DivPrune(keep=0.3)):
        together = apply(method, Tokens.of(parts))
        alone = [apply(method, Tokens.of([p])) for p in parts]
        assert together.counts() == [len(a) for a in alone]
        assert torch.allclose(together.x, torch.cat([a.x for a in alone]), atol=1e-6)


def test_tome_merges_what_is_alike_first() -> None:
    x = torch.eye(8)[None].clone()
    x[0, 4] = x[0, 1]  # the only pair that is alike
    out = apply(ToMe(keep=7 / 8), Tokens.of(x))
    assert out.position.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert out.size.tolist() == [1, 2, 1, 1, 1, 1, 1]
    assert torch.equal(out.x[1], x[0, 1])


def test_singletons_keep_their_own_features() -> None:
    x = torch.randn(1, 100, 16)
    out = apply(ToMe(keep=0.6), Tokens.of(x))
    single = out.size == 1
    assert single.any()
    assert torch.equal(out.x[single], x[0, out.position[single]])


def _dense(plan: Plan) -> torch.Tensor:
    return torch.zeros(plan.new, plan.old).index_put((plan.rows(), plan.source.long()), plan.shares(), accumulate=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_a_plan_is_a_matrix_and_plans_compose(N: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = Tokens.of([torch.randn(N, 5, generator=g), torch.randn(3, 5, generator=g)])
    anchor = torch.arange(N + 3)
    moved = torch.rand(N + 3, generator=g) < 0.5
    target = (torch.rand(N + 3, generator=g) * torch.where(anchor < N, N, 3)).long() + torch.where(anchor < N, 0, N)
    moved[target] = False  # what others join stays where it is
    first = Plan.assigning(tokens, torch.where(moved, target, anchor), torch.rand(N + 3, generator=g) + 0.1)
    middle = first.apply(tokens)
    second = Plan.keeping(middle, torch.rand(len(middle), generator=g) < 0.7)
    both = first.then(second)
    out = second.apply(middle)
    assert torch.allclose(out.x, _dense(both) @ tokens.x, atol=1e-5)
    assert torch.allclose(_dense(both), _dense(second) @ _dense(first), atol=1e-6)
    assert torch.equal(both.anchor, out.position)
    assert out.start == both.images


def test_a_plan_moves_everything_alike() -> None:
    x = torch.randn(6, 4)
    side, signal = torch.arange(6.0)[:, None], torch.arange(6.0)
    protected = torch.tensor([False, False, False, False, False, True])
    tokens = Tokens.of([x], side=[side], signals={"s": signal}, protected=protected)
    plan = Plan.assigning(tokens, torch.tensor([1, 1, 3, 3, -1, 5]))
    out = plan.apply(tokens)
    assert out.side[0].flatten().tolist() == [0.5, 2.5, 5]
    assert out.signals["s"].tolist() == [1, 3, 5]
    assert out.size.tolist() == [2, 2, 1]
    assert out.protected.tolist() == [False, False, True]
    assert out.original == (5,)
    with pytest.raises(ValueError, match="expected 6 tokens, got 3"):
        plan.apply(out)


def _grid(frames: int, h: int, w: int, video: bool = True, C: int = 8, seed: int = 0) -> Tokens:
    index = torch.arange(frames * h * w)
    place = torch.stack([index // (h * w), index // w % h, index % w], 1).int()
    x = torch.randn(frames * h * w, C, generator=torch.Generator().manual_seed(seed))
    return Tokens.of([x], place=place, video=[video])


def test_groups() -> None:
    tokens = _grid(2, 4, 6)
    assert Segments.of(tokens, Image()).count == 1
    assert Segments.of(tokens, Crop()).start.tolist() == [0, 24, 48]
    windows = Segments.of(tokens, Window(3, 3))
    assert windows.count == 2 * 2 * 2
    assert windows.order[:9].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert torch.equal(windows.label[windows.order], windows.label.sort().values)


@pytest.mark.parametrize("group", [Image(), Crop(), Window(2, 3)])
def test_matches_stay_within_a_group(group: Image | Crop | Window) -> None:
    tokens = _grid(3, 5, 7)
    role = torch.randint(3, (len(tokens),), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    parts = Segments.of(tokens, group)
    score, partner = parts.match(tokens.x, role)
    unit = torch.nn.functional.normalize(tokens.x, dim=1)
    able = (role == 1)[:, None] & (role == 2) & (parts.label[:, None] == parts.label)
    wanted, best = (unit @ unit.T).masked_fill(~able, -torch.inf).max(1)
    assert torch.allclose(score, wanted)
    assert torch.equal(partner, torch.where(able.any(1), best, -1))


def test_previous_finds_the_same_place_a_frame_before_in_videos_only() -> None:
    assert previous(_grid(3, 2, 2), 1).tolist() == [-1] * 4 + list(range(8))
    assert previous(_grid(3, 2, 2), 2).tolist() == [-1] * 8 + list(range(4))
    assert (previous(_grid(3, 2, 2, video=False), 1) == -1).all()
    thinned = Plan.keeping(_grid(2, 2, 2), torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool()).apply(_grid(2, 2, 2))
    assert previous(thinned, 1).tolist() == [-1, -1, -1, 0, -1, 2]


def test_novelty_is_the_same_by_views_and_by_gathering() -> None:
    whole = _grid(4, 3, 3)
    mask = torch.ones(36, dtype=torch.bool)
    mask[[2, 20]] = False
    thinned = Plan.keeping(whole, mask).apply(whole)
    a, b = Novelty()(whole), Novelty()(thinned)
    same = ~torch.isinf(b)
    assert torch.allclose(a[mask][same], b[same], atol=1e-6)
    assert torch.isinf(a[:9]).all()


def test_picks_respect_what_is_taken_and_protected() -> None:
    tokens = _grid(1, 6, 6, video=False)
    tokens = Tokens.of([tokens.x], place=tokens.place, protected=torch.arange(36) >= 34)
    picked = Union((Top(Chance(), Keep(0.25)), Every(FillTo(0.5)), Top(Chance(1), Count(3))))(tokens, tokens.protected & False)
    assert [(picked == k).sum().item() for k in (1, 2, 3)] == [9 + 2, 9 - 1, 3]  # 34 free: 8.5 → 9, 17, and 3 more
    assert (picked[34:] == 1).all()


def test_every_takes_the_centres_of_equal_parts() -> None:
    for n in (1, 2, 7, 36, 100):
        for m in range(1, n + 1):
            tokens = Tokens.of([torch.zeros(n, 1)])
            chosen = Every(Count(m))(tokens, tokens.protected).nonzero()[:, 0]
            assert torch.equal(chosen, (torch.arange(m) * n + n // 2) // m)


def test_around_takes_the_four_neighbours() -> None:
    tokens = _grid(2, 3, 4, video=False)
    taken = torch.zeros(24, dtype=torch.bool)
    taken[[5, 12]] = True  # the middle of crop 0, a corner of crop 1
    assert Around()(tokens, taken).nonzero()[:, 0].tolist() == [1, 4, 6, 9, 13, 16]


def test_density_peaks_are_one_per_cluster() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = (centres[:, None] + 0.5 * torch.randn(3, 20, 2, generator=g)).flatten(0, 1)
    assert sorted((density_peaks(x, 3, 5) // 20).tolist()) == [0, 1, 2]


def test_schedules_end_at_keep() -> None:
    for N in (9, 144, 576):
        for keep in (0.1, 0.25, 0.5, 0.9, 1.0):
            for layers in (6, 12, 23):
                pairs = Bipartite(keep).schedule(layers, N)
                left = N
                for r in pairs:
                    assert 0 <= r <= left // 2
                    left -= r
                assert left == kept(keep, N)
    assert Bipartite(r=16).schedule(3, 100) == [16, 16, 16]
    with pytest.raises(ValueError, match="r for 3 layers, got 2"):
        Bipartite(r=(1, 2)).schedule(3, 100)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", [m for m in METHODS if m is not PixelPrune])
def test_keep_outside_its_range(method: type, keep: float) -> None:
    with pytest.raises(ValueError, match=rf"{method.__name__}: expected keep in \(0, 1\]"):
        method(keep=keep)


def test_bad_fields_are_told() -> None:
    with pytest.raises(TypeError, match="number in"):
        ToMe(keep="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cosine' or 'dot', got 'l2'"):
        ToMe(metric="l2")
    with pytest.raises(ValueError, match="'projector' or 'vision', got 'middle'"):
        Step(Bipartite(), at="middle")
    with pytest.raises(TypeError, match="expected methods such as"):
        Recipe([0.25])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="NaN or Inf"):
        Tokens.of(torch.full((1, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        Tokens.of(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="was not provided"):
        apply(VisionZip(), Tokens.of(torch.randn(1, 9, 4)))
    with pytest.raises(ValueError, match="which needs a model"):
        apply(ToMe(at="vision"), Tokens.of(torch.randn(1, 9, 4)))


def test_recipes_survive_files(tmp_path: Path) -> None:
    methods = [m() for m in METHODS]
    own = Step(Select(Union((Top(Chance(3), Count(5)), Every(FillTo(0.5))))))
    for recipe in (Recipe(methods), Recipe([own, ToMe(keep=0.1, at="vision", r=(1, 2, 3))], positions="renumbered")):
        recipe.to_yaml(tmp_path / "recipe.yaml")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
        assert Recipe.from_yaml(str(tmp_path / "recipe.yaml")) == recipe
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml("[{ToMe: {keep: 0.25}}]") == Recipe([ToMe(keep=0.25)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{TomMe: {keep: 0.25}}]", "'TomMe'; did you mean ToMe"),
        ("[{ToMe: {kep: 0.25}}]", "fields keep, metric, at, r, proportional, got 'kep'"),
        ("[{ToMe: {keep: 2}}]", "keep in"),
        ("[{ToMe: 0.25}]", "fields as a mapping"),
        ("{steps: []}", "a list called methods"),
        ("{methods: [], position: x}", "got 'position'"),
        ("[{ToMe: {keep: 0.25}, AIM: {}}]", "one name with its fields"),
        ("[", "expected YAML"),
        ("[Keep]", "expected methods such as|required positional"),
    ],
)
def test_bad_recipes_are_told(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe.from_yaml(text)
