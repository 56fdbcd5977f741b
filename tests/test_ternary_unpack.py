"""What is special to ternary_pack, its format and ternary_unpack: sizes, checks, corrupt bytes."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at
from specs.ternary_unpack import trits

from effvlm import _core
from effvlm.ops import TernaryWeight, ternary_matmul, ternary_pack, ternary_unpack


def _random(shape: tuple[int, ...], zeros: float, levels: int = 3, seed: int = 0) -> torch.Tensor:
    return trits(shape, zeros, levels, torch.Generator().manual_seed(seed))


def _fresh(w: TernaryWeight) -> TernaryWeight:
    """As read from a file: nothing is known to be right."""
    return TernaryWeight.from_tensors({name: t.clone() for name, t in w.tensors().items()})


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(0, 700)),
    st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.8, 0.885, 0.95, 0.98, 0.995, 1.0]),
    st.sampled_from([3, 5]),
    st.integers(0, 2**31),
)
def test_round_trip(shape: tuple[int, int, int], zeros: float, levels: int, seed: int) -> None:
    w = ternary_pack(t := _random(shape, zeros, levels, seed), torch.ones(shape[:2]), levels=levels)
    read = _fresh(w)
    read.validate()
    assert torch.equal(ternary_unpack(read), t)
    assert read.shape == t.shape


@pytest.mark.parametrize("level", _core.cpu_isas())
def test_one_vector_may_start_over_32_rows(level: str) -> None:
    t = torch.zeros(64, 256, dtype=torch.int8)
    t[torch.arange(64), torch.arange(64).flip(0)] = 1
    w = ternary_pack(t, torch.ones(64))
    with at(level):
        assert torch.equal(ternary_unpack(w), t)
        for kind in ("int8", "exact"):
            assert torch.equal(ternary_matmul(torch.ones(1, 256), w, kind), torch.ones(1, 64))


@pytest.mark.parametrize(("columns", "bound"), [(6144, 1.045), (2048, 1.06), (768, 1.10)])
@pytest.mark.parametrize("zeros", [0.80, 0.85, 0.885, 0.90, 0.93, 0.94, 0.95])
def test_size_is_near_the_entropy(columns: int, bound: float, zeros: float) -> None:
    t = _random((512, columns), zeros)
    w = ternary_pack(t, torch.ones(512))
    p = (t == 0).double().mean().item()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + (1 - p)
    assert w.bits_per_weight <= bound * entropy
    assert w.nbytes == sum(x.numel() * x.element_size() for x in w.tensors().values())


def test_size_never_exceeds_the_dense_planes() -> None:
    for levels, bits in ((3, 2), (5, 3)):
        w = ternary_pack(_random((256, 1024), 0.1, levels), torch.ones(256), levels=levels)
        assert w.bits_per_weight < bits + 0.05


def test_bytes_do_not_depend_on_threads() -> None:
    t, packed = _random((2, 300, 600), 0.9), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed.append(ternary_pack(t, torch.ones(2, 300)).tensors())
    for other in packed[1:]:
        assert all(torch.equal(packed[0][k].view(torch.uint8), other[k].view(torch.uint8)) for k in other)


def test_strided_and_two_dimensional_weights() -> None:
    t = _random((96, 300), 0.9)
    w = ternary_pack(t.T, torch.ones(300))
    assert w.shape == (300, 96)
    assert torch.equal(ternary_unpack(w), t.T)


def test_scales_are_rounded_to_bfloat16() -> None:
    w = ternary_pack(_random((64, 256), 0.9), scales := torch.rand(64))
    assert torch.equal(w.scales[0], scales.bfloat16())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, s: (t.float(), s), "int8 (R, C)"),
        (lambda t, s: (t[0], s), "int8 (R, C)"),
        (lambda t, s: (t, s[1:]), "shape (64,)"),
        (lambda t, s: (t * 2, s), "weights in -1 … 1, got"),
        (lambda t, s: (t, s * float("nan")), "finite scales"),
        (lambda t, s: (t, 1.0), "got float"),
        (lambda t, s: ([[1]], s), "got list"),
    ],
)
def test_bad_input(change: object, text: str) -> None:
    with pytest.raises(ValueError, match="ternary_pack") as caught:
        ternary_pack(*change(_random((64, 256), 0.5), torch.ones(64)))  # type: ignore[operator]
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["header", "data", "tiles", "base", "scales", "checksums"])
def test_a_flipped_bit_anywhere_is_found(name: str) -> None:
    """By a checksum; all of a part's bytes are covered but the zeros behind the data, which are checked themselves."""
    w = ternary_pack(_random((2, 70, 300), 0.9), torch.ones(2, 70))
    for place in np.random.default_rng(0).integers(0, w.tensors()[name].view(torch.uint8).numel(), 20):
        damaged = {k: t.clone() for k, t in w.tensors().items()}
        damaged[name].view(torch.uint8).flatten()[int(place)] ^= 1 << int(place) % 8
        with pytest.raises(ValueError, match=r"corrupt|version"):
            TernaryWeight.from_tensors(damaged).validate()


def test_missing_and_misshapen_parts() -> None:
    parts = ternary_pack(_random((70, 300), 0.9), torch.ones(70)).tensors()
    for name in parts:
        with pytest.raises(ValueError, match=f"got no {name}"):
            TernaryWeight.from_tensors({k: t for k, t in parts.items() if k != name})
        with pytest.raises(ValueError, match="corrupt"):
            TernaryWeight.from_tensors(parts | {name: parts[name][:-1].contiguous()}).validate()


def _structure_is_checked(w: TernaryWeight) -> None:
    """The second line: what a checksum of wrong bytes would let through."""
    E, R, C = w.header[4:7].tolist()
    from effvlm._library import call_host

    call_host("gap_planes_validate", w.data, w.tiles, w.base, E, R, C, w.levels, 0, E)


@pytest.mark.parametrize("level", _core.cpu_isas())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash(level: str, data: st.DataObject) -> None:
    """Whatever the bytes, kernels raise or return numbers: they read and write inside their tensors (run under AddressSanitizer
    by EFFVLM_SANITIZE=address, see CONTRIBUTING)."""
    zeros, levels = data.draw(st.sampled_from([0.3, 0.885, 0.99])), data.draw(st.sampled_from([3, 5]))
    w = ternary_pack(_random((2, 130, 420), zeros, levels), torch.ones(2, 130), levels=levels)
    name = data.draw(st.sampled_from(["data", "tiles", "base"]))
    words = w.tensors()[name].view(torch.int32).flatten()
    for _ in range(data.draw(st.integers(1, 8))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.integers(-(2**31), 2**31 - 1))
    _core.set_cpu_isa(level)
    try:
        for tokens, int8 in ((1, True), (1, False), (20, True), (20, False)):
            x, ids = torch.ones(tokens, 420), torch.zeros(tokens, dtype=torch.int64)
            for run in (
                lambda x=x, ids=ids, int8=int8: ternary_matmul(x, w, "int8" if int8 else "exact", ids=ids),
                lambda: ternary_unpack(w),
                lambda: _structure_is_checked(w),
            ):
                with contextlib.suppress(ValueError):
                    run()
    finally:
        _core.set_cpu_isa(None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([0.3, 0.8, 0.885, 0.95, 0.99]), st.sampled_from([3, 5]))
def test_a_tile_that_passes_the_check_is_canonical(seed: int, zeros: float, levels: int) -> None:
    """One flipped bit in the data or the directory is either refused or gives other weights that pack to these very bytes."""
    w = ternary_pack(_random((70, 300), zeros, levels, seed), torch.ones(70), levels=levels)
    rng = np.random.default_rng(seed)
    part = w.data if rng.random() < 0.7 else w.tiles
    bytes_ = part.view(torch.uint8).flatten()
    bytes_[int(rng.integers(len(bytes_)))] ^= 1 << int(rng.integers(8))
    try:
        _structure_is_checked(w)
    except ValueError:
        return
    values = ternary_unpack(w)
    assert values.abs().max() <= levels // 2
    again = ternary_pack(values, torch.ones(70), levels=levels)
    assert torch.equal(ternary_unpack(again), values)
