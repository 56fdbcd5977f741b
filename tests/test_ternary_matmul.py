"""What is special to ternary_matmul: whole-number sums are the same everywhere, and the public function's errors."""

from __future__ import annotations

import pytest
import torch
from levels import at, why_not
from specs.ternary_unpack import trits

from effvlm import _core, _library
from effvlm.ops import TernaryWeight, ternary_matmul, ternary_pack, ternary_unpack


def _weight(E: int, R: int, C: int, zeros: float = 0.885, levels: int = 3, seed: int = 0) -> TernaryWeight:
    generator = torch.Generator().manual_seed(seed)
    return ternary_pack(trits((E, R, C), zeros, levels, generator), torch.rand(E, R, generator=generator) + 0.5, levels=levels)


@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("tokens", [1, 3, 5, 40])
def test_int8_gives_the_same_bits_at_every_level(tokens: int, levels: int) -> None:
    w = _weight(2, 200, 740, 0.8, levels)
    x = torch.randn(tokens, 740) * torch.logspace(-3, 3, tokens)[:, None]
    x[0, 5] = 1e4
    ids = torch.arange(tokens)[:, None] % 3  # 2: nowhere
    with _library.backend("reference"):
        expected = ternary_matmul(x, w, "int8", ids=ids)
    for level in (*_core.cpu_isas(), "amx_emulated"):
        if why_not(level):
            continue
        with at(level):
            assert torch.equal(ternary_matmul(x, w, "int8", ids=ids), expected), level


def test_int8_is_close_to_exact() -> None:
    w, x = _weight(1, 256, 2048), torch.randn(8, 2048)
    ids = torch.zeros(8, dtype=torch.int64)
    exact, rounded = (ternary_matmul(x, w, kind, ids=ids) for kind in ("exact", "int8"))
    assert (exact - rounded).norm() / exact.norm() < 0.01


def test_an_outlier_costs_only_its_strip() -> None:
    w, x = _weight(1, 64, 1024), torch.randn(1, 1024)
    plain = ternary_matmul(x, w, "int8", ids=torch.zeros(1, dtype=torch.int64))
    x[0, 300] = 200.0
    trit = ternary_unpack(w)[0, :, 300]
    quiet = trit == 0  # rows that do not see it: other strips keep steps of their own
    with_outlier = ternary_matmul(x, w, "int8", ids=torch.zeros(1, dtype=torch.int64))
    assert (plain - with_outlier)[0, quiet].norm() / plain[0, quiet].norm() < 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_is_nan_in_int8_and_alone_so(value: float) -> None:
    w, x = _weight(1, 130, 512), torch.randn(6, 512)
    clean = ternary_matmul(x, w, "int8", ids=torch.zeros(6, dtype=torch.int64))
    x[2, 100] = value
    for level in _core.cpu_isas():
        with at(level):
            got = ternary_matmul(x, w, "int8", ids=torch.zeros(6, dtype=torch.int64))
            assert got[2].isnan().all()
            assert torch.equal(got[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("tokens", [1, 20])
def test_few_and_many_tokens_give_the_same_int8_sums(tokens: int) -> None:
    w, x = _weight(1, 200, 740), torch.randn(tokens, 740)
    together = ternary_matmul(x, w, "int8", ids=torch.zeros(tokens, dtype=torch.int64))
    alone = torch.cat([ternary_matmul(row[None], w, "int8", ids=torch.zeros(1, dtype=torch.int64)) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("entries", [31, 32, 33, 40, 41, 63, 64, 65, 127, 128, 129, 192, 255, 256])
def test_a_long_row_among_short_ones(entries: int, levels: int, tokens: int) -> None:
    """Rows are summed in vectors; a tile with one long row is not stored as a bit map."""
    t, ids = trits((1, 64, 256), 0.95, 3, torch.Generator().manual_seed(0)), torch.zeros(tokens, dtype=torch.int64)
    t[0, 5] = 0
    t[0, 5, torch.randperm(256, generator=torch.Generator().manual_seed(1))[:entries]] = {3: 1, 5: -2}[levels]
    w, x = ternary_pack(t, torch.ones(1, 64), levels=levels), torch.randn(tokens, 256)
    assert int(w.tiles.view(torch.int32)[0, 0, 0, 1]) >> 30 & 3 != 2  # gaps, not a bit map
    with _library.backend("reference"):
        exact, whole = (ternary_matmul(x, w, kind, ids=ids) for kind in ("exact", "int8"))
    for level in (*_core.cpu_isas(), "amx_emulated"):
        if why_not(level):
            continue
        with at(level):
            torch.testing.assert_close(ternary_matmul(x, w, ids=ids), exact, rtol=0, atol=1e-4, msg=level)
            assert torch.equal(ternary_matmul(x, w, "int8", ids=ids), whole), level


def test_one_matrix_and_shapes() -> None:
    t, x = trits((96, 300), 0.9, 3, torch.Generator()), torch.randn(4, 300)
    w = ternary_pack(t, torch.ones(96))
    assert torch.allclose(ternary_matmul(x, w), x @ t.float().T, atol=1e-4)
    stack = _weight(3, 96, 300)
    assert ternary_matmul(x, stack, ids=torch.zeros(4, dtype=torch.int64)).shape == (4, 96)
    assert ternary_matmul(x, stack, ids=torch.zeros(4, 2, dtype=torch.int64)).shape == (4, 2, 96)


def test_errors_say_what_was_expected() -> None:
    w, x = _weight(2, 96, 300), torch.randn(4, 300)
    ids = torch.zeros(4, dtype=torch.int64)
    for call, error, text in (
        (lambda: ternary_matmul(x, torch.ones(96, 300)), TypeError, "TernaryWeight"),
        (lambda: ternary_matmul(x, w, "int4", ids=ids), ValueError, "'exact' or 'int8', got 'int4'"),
        (lambda: ternary_matmul(x, w), ValueError, "ids with a stack"),
        (lambda: ternary_matmul(x[:, 1:], w, ids=ids), ValueError, "C = 300"),
        (lambda: ternary_matmul(x, w, ids=ids + 7), ValueError, "got 7 at token 0"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)


def test_a_damaged_matrix_is_refused_when_it_is_first_used() -> None:
    parts = _weight(2, 96, 300).tensors()
    parts["data"] = parts["data"].clone()
    parts["data"][-20:-16] = 7
    w, x = TernaryWeight.from_tensors(parts), torch.randn(4, 300)
    ternary_matmul(x, w, ids=torch.zeros(4, dtype=torch.int64))  # the first matrix is whole, and the other not yet read
    with pytest.raises(ValueError, match="checksum of matrix 1"):
        ternary_matmul(x, w, ids=torch.ones(4, dtype=torch.int64))


def test_compiles_whole() -> None:
    w, x = _weight(2, 96, 300), torch.randn(4, 300)
    ids = torch.zeros(4, 1, dtype=torch.int64)

    def f(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.effvlm.ternary_matmul(x, ids, w.data, w.tiles, w.base, w.scales, w.levels, True).relu()

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, ids), f(x, ids))


def test_backward_to_the_tokens_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_said", set())
    w = _weight(1, 96, 300)
    x = torch.randn(2, 300, requires_grad=True)
    with pytest.warns(UserWarning, match="requires grad"):
        ternary_matmul(x, w, ids=torch.zeros(2, dtype=torch.int64)).sum().backward()
    dense = ternary_unpack(w)[0].float() * w.scales[0].float()[:, None]
    assert torch.allclose(x.grad, dense.sum(0).expand(2, -1), atol=1e-4)
