"""The parts of effvlm.quant, each against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rate_distortion import layer

from effvlm.quant import Gram, TernaryRecipe, allocate, bits_per_weight
from effvlm.quant.anneal import Descent, best, expected
from effvlm.quant.gptq import factor, gptq
from effvlm.quant.measure import fit
from effvlm.quant.problem import Problem, largest_directions
from effvlm.quant.rtn import row_levels, rtn, thresholds


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def naive_gptq(weight: torch.Tensor, hessian: torch.Tensor, step: float) -> torch.Tensor:
    """The paper's algorithm, one column at a time, on one (R, C) float64 matrix; rounds to multiples of ``step``."""
    w, made = weight.clone(), torch.empty_like(weight)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for j in range(w.shape[1]):
        made[:, j] = (w[:, j] / step).round() * step
        w[:, j:] -= ((w[:, j] - made[:, j]) / inverse[j, j])[:, None] * inverse[j, j:]
    return made


@pytest.mark.parametrize("block", [7, 32, 128])
def test_gptq_is_the_algorithm_of_the_paper(block: int) -> None:
    x = torch.randn(2, 200, 60)
    hessian, weight = x.mT @ x, torch.randn(2, 5, 60)
    made = gptq(weight.mT.contiguous(), factor(hessian), lambda w, cost: (w / 0.5).round() * 0.5, block).mT
    for b in range(2):
        expected_ = naive_gptq(weight[b].double(), hessian[b].double(), 0.5)
        assert (made[b] != expected_.float()).float().mean() < 0.01, "float32 may round a tie the other way"
    parts = factor(hessian)
    again = parts.unit * parts.cost[:, None] @ parts.unit.mT
    torch.testing.assert_close(again, hessian, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("top", [1, 2])
def test_choices_of_one_trit_are_best(top: int) -> None:
    field, price, h = torch.randn(1000) * 3, torch.rand(1000) * 2, torch.rand(1000) + 0.3
    levels = torch.arange(-top, top + 1.0)[:, None]
    energy = h * levels**2 - field * levels + price * (levels != 0)
    assert torch.equal(best(field, price, h, top), levels[energy.argmin(0), 0])
    weights = torch.softmax(-energy.double() * math.log(2), 0)
    torch.testing.assert_close(expected(field, price, h, top), (weights * levels).sum(0).float(), rtol=1e-4, atol=1e-6)
    level, size = torch.rand(1000) + 0.1, torch.rand(1000) * 4
    bars = thresholds(level, price, top)
    energy = (size - level * levels) ** 2 + price * (levels != 0)
    assert torch.equal(sum((size > bar).float() for bar in bars), levels[energy.argmin(0), 0])


@pytest.mark.parametrize("top", [1, 2])
def test_descent_goes_down_to_where_no_single_trit_can_be_bettered(top: int) -> None:
    weight, hessian = layer("gaussian i^-1", 16, 128, 512)
    problem = Problem.of(weight[None], hessian[None], torch.tensor([0.1]))
    zeros, price = torch.zeros_like(problem.weight), 0.3
    descent, costs = Descent(problem.whole, problem.whole_product(), zeros, torch.ones(1, 1, 16), top, 64), []
    for sweep in range(40):
        away = problem.weight - descent.scale * descent.trits
        costs.append(float((away * (problem.whole @ away)).sum() + price * descent.trits.count_nonzero()))
        descent.sweep(torch.full((1, 1, 1), price))
        if sweep < 20:
            descent.refit()
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(costs)), costs
    away, a, t = problem.weight - descent.scale * descent.trits, descent.scale, descent.trits
    for other in range(-top, top + 1):
        step = a * (other - t)
        gain = 2 * step * (problem.whole @ away) - step**2 * problem.whole.diagonal(dim1=1, dim2=2)[:, :, None]
        assert bool((gain - price * ((t == 0) & (other != 0)) + price * ((t != 0) & (other == 0)) < 1e-3).all()), other


def test_largest_directions_are_clipped_to_a_tenth() -> None:
    turn = torch.linalg.qr(torch.randn(64, 64)).Q
    values = torch.ones(64)
    values[0], values[1] = 400.0, 200.0
    hessian = (turn * values) @ turn.T
    lift = largest_directions(hessian[None])[0]
    left = torch.linalg.eigvalsh(hessian - lift @ lift.T)
    torch.testing.assert_close(left[-2:], torch.full((2,), 66.2), rtol=1e-3, atol=0)
    assert float(left[0]) > 0.9


def tile_bits(tile: list[int], pitch: int, five: bool) -> int:
    """A tile by the words of the format's description, one entry after the other."""
    entries, last = [], -1
    for at, value in enumerate(tile):
        if not value:
            continue
        row = -1 if last < 0 else last // pitch
        while not (at // pitch <= row + 1 and at - last <= 256):
            entries.append((pitch - 1, 3))
            last += pitch
            row += 1
        entries.append((at - last - 1, abs(value)))
        last = at
    bridged = any(kind == 3 for _, kind in entries)
    sizes = [(3 if five else 2) * len(tile) // 8]
    for k in range(6):
        unary = sum((gap >> k) + 1 for gap, _ in entries)
        planes = k + 1 + (bridged or any(kind == 2 for _, kind in entries))
        full, rest = divmod(len(entries), 64)
        if unary < 1 << 14 and not (five and bridged):
            sizes.append(((unary + 7) // 8 + planes * (8 * full + (rest + 7) // 8) + 3) // 4 * 4)
    return 8 * min(sizes)


def assert_bits_of_the_format(trits: torch.Tensor) -> None:
    R, C = trits.shape
    strips, at, left = [(at, 256) for at in range(0, C - C % 256, 256)], C - C % 256, -(-(C % 256) // 32) * 32
    for width in (256, 128, 64, 32):
        if left & width:
            strips.append((at, width))
            at += width
    total = 16 * R
    for (begin, width), row in itertools.product(strips, range(0, R, 64)):
        tile = torch.zeros(64, width, dtype=torch.int8)
        part = trits[row : row + 64, begin : begin + width]
        tile[: part.shape[0], : part.shape[1]] = part
        total += 64 + tile_bits(tile.flatten().tolist(), width, bool(trits.abs().max() > 1)) + (32 if begin == 0 else 0)
    assert float(bits_per_weight(trits[None])) == pytest.approx(total / (R * C), abs=1e-12)


@pytest.mark.parametrize(("R", "C"), [(64, 256), (70, 300), (130, 32), (3, 1000)])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.97, 0.995, 1.0])
@pytest.mark.parametrize("five", [False, True])
def test_bits_are_those_of_the_format(R: int, C: int, zeros: float, five: bool) -> None:
    trits = torch.randint(1, 3 if five else 2, (R, C)) * torch.randint(0, 2, (R, C)).mul(2).sub(1) * (torch.rand(R, C) >= zeros)
    assert_bits_of_the_format(trits.to(torch.int8))


@pytest.mark.parametrize("columns", [range(5, 6), range(255, -1, -4), range(0, 256, 4), range(0, 64, 9)])
@pytest.mark.parametrize("every", [1, 3])
def test_bits_where_rows_are_nearly_empty(columns: range, every: int) -> None:
    trits = torch.zeros(64, 256, dtype=torch.int8)
    for row in range(0, 64, every):
        trits[row, columns[row % len(columns)]] = 1
    assert_bits_of_the_format(trits)


@pytest.mark.parametrize(("target", "top"), [(0.4, 1), (0.8, 1), (1.3, 1), (1.3, 2)])
def test_rtn_meets_its_rate_and_beats_the_threshold_of_half(target: float, top: int) -> None:
    weight = torch.randn(256, 768) * torch.rand(256, 1).exp()
    trits = rtn(weight, target, top)
    assert float(bits_per_weight(trits[None])) == pytest.approx(target, rel=0.01)
    assert int(trits.abs().max()) == top
    high = weight.abs().amax(1, keepdim=True)
    grid = (weight > high / 2).to(torch.int8) - (weight < -high / 2).to(torch.int8)
    same_rate = rtn(weight, max(0.4, float(bits_per_weight(grid[None]))), 1)
    ours_, theirs = (float(fit(weight[None], t[None]).error) for t in (same_rate, grid))
    assert ours_ < 0.99 * theirs


def test_levels_are_least_squares_for_their_own_trits() -> None:
    weight, cost = torch.randn(1, 16, 2048), torch.rand(1, 1, 2048) + 0.1
    for top, price in itertools.product((1, 2), (0.01, 0.3, 1.0)):
        level = row_levels(weight, torch.tensor(price), top, cost)
        trits = sum((weight.abs() > bar).float() for bar in thresholds(level, price / cost, top))
        own = (cost * trits * weight.abs()).sum(2) / (cost * trits**2).sum(2)
        torch.testing.assert_close(own, level[:, :, 0], rtol=0.05, atol=0)


def test_allocation_spends_the_budget_where_it_counts() -> None:
    slope, start = torch.tensor([1.4, 1.4, 1.4, 0.7]), torch.tensor([0.5, 0.5, 0.5, 0.5])
    rates = (0.5, 0.8, 1.2)
    error = start[:, None] * torch.exp(-slope[:, None] * torch.tensor(rates))
    weight, size = torch.tensor([1.0, 2.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    bits = allocate(error, weight, 0.75, size, rates)
    assert float((bits * size).sum() / size.sum()) == pytest.approx(0.75, abs=1e-6)
    assert float(bits[2]) == 0.4
    assert float(bits[1] - bits[0]) == pytest.approx(math.log(2) / 1.4, rel=1e-5), "equal fall of weight · error per bit"

    def lost(b: torch.Tensor) -> float:
        return float((weight * start * torch.exp(-slope * b)).sum())

    assert lost(bits) < lost(torch.full((4,), 0.75))
    for i, j in itertools.permutations((0, 1, 3), 2):
        moved = bits.clone()
        moved[i] += 0.02 / float(size[i])
        moved[j] -= 0.02 / float(size[j])
        assert lost(moved) > lost(bits)
    assert allocate(error, torch.zeros(4), 0.8, size, rates).tolist() == [0.8] * 4
    with pytest.raises(ValueError, match="finite errors"):
        allocate(error * math.nan, weight, 0.8, size, rates)
    with pytest.raises(ValueError, match="target_bits"):
        allocate(error, weight, 2.0, size, rates)


def test_gram_sums_counts_and_stops_at_the_limit() -> None:
    counts = torch.tensor([100, 4, 4])
    gram = Gram(3, 16, counts, max_tokens_factor=2)
    rows = torch.randn(100, 16).bfloat16()
    assert gram.limit == 72
    assert [gram.add(0, part) for part in rows.split(30)] == [30, 30, 12, 0]
    assert gram.add(2, rows[:4]) == 4
    kept = rows[:72].float()
    torch.testing.assert_close(gram.sums[0], kept.T @ kept)
    assert gram.tokens.tolist() == [72, 0, 4]
    assert gram.sums[1].count_nonzero() == 0
    with pytest.raises(ValueError, match="rows of shape"):
        gram.add(0, torch.zeros(3, 15))
    with pytest.raises(ValueError, match="NaN or Inf among those of expert 1"):
        gram.add(1, torch.full((1, 16), math.inf))
    with pytest.raises(ValueError, match="counts of shape"):
        Gram(2, 16, counts)


def test_recipes_are_checked_and_survive_a_dict() -> None:
    recipe = TernaryRecipe(target_bits=0.65, levels=5, damp=0.02)
    assert TernaryRecipe.from_dict(recipe.to_dict()) == recipe
    for name, value in {
        "target_bits": 0.3, "method": "awq", "levels": 4, "damp": -1, "shrink": math.nan, "block": 0, "sweeps": 1.5,
        "iterations": 0, "max_tokens_factor": 0.5, "min_tokens": True, "allocate": 1,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"expected {name} to be"):
            TernaryRecipe.from_dict({name: value})
    with pytest.raises(ValueError, match="got 'bits'"):
        TernaryRecipe.from_dict({"bits": 1})
