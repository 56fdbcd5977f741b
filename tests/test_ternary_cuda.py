"""What is special to the CUDA kernels for gap planes: the CPU's bits, two entry points per tile, and bytes that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import at, why_not
from specs.ternary_unpack import trits

from effvlm.ops import TernaryWeight, ternary_pack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request: Any) -> str:
    """The emulator, and a GPU if there is one."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    return str(request.param)


def _weight(shape: tuple[int, int, int], zeros: float, levels: int = 3, seed: int = 0) -> TernaryWeight:
    generator = torch.Generator().manual_seed(seed)
    return ternary_pack(trits(shape, zeros, levels, generator), torch.rand(shape[:2], generator=generator) - 0.5, levels=levels)


def _unpack(w: TernaryWeight, level: str, **changed: torch.Tensor) -> torch.Tensor:
    """The op itself: nothing is validated."""
    planes = w.tensors() | changed
    with at(level) as device:
        data, tiles, base = (planes[name].to(device) for name in ("data", "tiles", "base"))
        return torch.ops.effvlm.ternary_unpack(data, tiles, base, *w.scales.shape[1:], int(w.header[6]), w.levels).cpu()


def _matmul(
    x: torch.Tensor, ids: torch.Tensor, w: TernaryWeight, int8: bool, level: str, **changed: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    planes = w.tensors() | changed
    with at(level) as device:
        parts = [planes[name].to(device) for name in ("data", "tiles", "base", "scales")]
        moved = x.to(device) if x.device != device else x
        return torch.ops.effvlm.ternary_matmul(moved, ids.to(device), *parts, w.levels, int8).cpu()


def _tokens(T: int, C: int, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes; with an outlier, and, where there are enough, zeros, next to nothing, NaN and infinity."""
    x = torch.randn(T, C, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, T)[:, None]
    x[0, C // 2] = 1e4
    if T > 4:
        x[1], x[2], x[3, 0], x[4, -1] = 0, x[2] * 1e-36, torch.nan, torch.inf
    return x


@pytest.mark.parametrize(
    ("T", "K", "E", "R", "C", "zeros", "levels"),
    [
        (1, 1, 1, 64, 256, 0.885, 3),
        (3, 2, 3, 70, 700, 0.85, 3),
        (9, 1, 2, 130, 300, 0.995, 3),
        (41, 1, 1, 33, 480, 0.7, 3),  # more tokens than share the decoding of a tile
        (4, 2, 40, 30, 96, 0.9, 3),  # fewer choices than matrices
        (1040, 1, 2, 3, 32, 0.5, 3),  # more choices than every block looks at
        (6, 2, 3, 70, 700, 0.6, 5),
        (5, 1, 2, 64, 256, 0.1, 5),
    ],
)
def test_int8_gives_the_bits_of_the_cpu(
    gpu: str, T: int, K: int, E: int, R: int, C: int, zeros: float, levels: int
) -> None:  # fmt: skip
    w, x = _weight((E, R, C), zeros, levels), _tokens(T, C)
    ids = torch.randint(-1, E + 1, (T, K), generator=torch.Generator().manual_seed(1))
    ids[-1] = ids[0, 0] = 0  # some matrix twice
    for dtype in DTYPES[: 1 if T > 1000 else 3]:
        tokens = x.T.contiguous().T if dtype == torch.float32 else x.to(dtype)
        expected = _matmul(tokens, ids, w, True, "scalar")
        torch.testing.assert_close(_matmul(tokens, ids, w, True, gpu), expected, rtol=0, atol=0, equal_nan=True)


def test_sums_of_several_strips_in_one_slot(gpu: str) -> None:
    """So many choices that partial sums of every strip would be too many, most of which go nowhere."""
    w, x = _weight((1, 1024, 900), 0.95), _tokens(1, 900)
    ids = torch.full((1, 1100), -1)
    ids[0, [0, 7, 1099]] = 0
    expected, got = (_matmul(x, ids, w, True, level) for level in ("scalar", gpu))
    assert torch.equal(got, expected)
    assert got[0, 7].any()
    exact = [_matmul(x, ids, w, False, level) for level in ("scalar", gpu)]
    torch.testing.assert_close(exact[1], exact[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("zeros", [0.2, 0.55, 0.75, 0.97, 0.999])
def test_strips_of_every_width(gpu: str, zeros: float, levels: int) -> None:
    for columns in (32, 64, 96, 128, 224, 256, 300):
        w = _weight((1, 70, columns), zeros, levels, seed=columns)
        assert torch.equal(_unpack(w, gpu), _unpack(w, "scalar")), columns


def test_planes_at_an_odd_word(gpu: str) -> None:
    w = _weight((2, 70, 300), 0.9)
    shifted = torch.cat([w.data[:3].view(torch.int32), w.data.view(torch.int32)]).view(torch.uint32)[3:]
    assert shifted.data_ptr() % 16
    assert torch.equal(_unpack(w, gpu, data=shifted), _unpack(w, "scalar"))


def test_a_token_that_is_not_finite_is_alone_so(gpu: str) -> None:
    w, x, ids = _weight((1, 70, 300), 0.9), torch.randn(9, 300), torch.zeros(9, 1, dtype=torch.int64)
    for dtype in DTYPES:
        clean = _matmul(x.to(dtype), ids, w, False, gpu)
        x_bad = x.to(dtype).clone()
        x_bad[3, 17] = torch.nan
        got = _matmul(x_bad, ids, w, False, gpu)
        assert got[3].isnan().any()
        assert torch.equal(got[[0, 1, 2, 4, 5, 6, 7, 8]], clean[[0, 1, 2, 4, 5, 6, 7, 8]])


def _flipped(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Other bits at these places, counted over all bits."""
    bits = tensor.clone().view(torch.uint8)
    for place in places.tolist():
        bits.view(-1)[place // 8] ^= 1 << place % 8
    return bits.view(torch.uint32)


@pytest.mark.parametrize("pitch", [256, 128, 32])
def test_the_second_half_starts_where_the_directory_says(gpu: str, pitch: int) -> None:
    """Tile (0, 0) with another entry point: its upper half and all other tiles are as they were, but for a later bit."""
    w = _weight((1, 128, pitch), 0.9)
    whole = _unpack(w, gpu)
    assert torch.equal(whole, _unpack(w, "scalar"))
    for bit in range(22):  # 14 of middle_bit, 8 of middle_column
        got = _unpack(w, gpu, tiles=_flipped(w.tiles, torch.tensor([32 + bit])))
        assert torch.equal(got[:, 64:], whole[:, 64:])
        assert not torch.equal(got[:, 32:64], whole[:, 32:64])
        if bit >= 14:
            assert torch.equal(got[:, :32], whole[:, :32])


@pytest.mark.parametrize("name", ["data", "tiles", "base"])
@pytest.mark.parametrize("levels", [3, 5])
def test_corrupt_bytes_harm_nobody(gpu: str, name: str, levels: int) -> None:
    """Values may be anything; reads and writes stay where they belong, no two threads meet, and all of the output is written."""
    generator = torch.Generator().manual_seed(levels)
    x, ids = _tokens(3, 300), torch.tensor([[0, 1], [1, -1], [1, 1]])
    for trial in range(12):
        w = _weight((2, 70, 300), (0.3, 0.8, 0.93, 0.99)[trial % 4], levels, seed=trial)
        bits = 32 * getattr(w, name).numel()
        wrong = {name: _flipped(getattr(w, name), torch.randint(bits, (1 + trial * trial,), generator=generator))}
        assert _unpack(w, gpu, **wrong).shape == (2, 70, 300)
        assert _matmul(x, ids, w, True, gpu, **wrong).shape == (3, 2, 70)
        assert _matmul(x.bfloat16(), ids, w, False, gpu, **wrong).shape == (3, 2, 70)
