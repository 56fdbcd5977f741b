"""bench/ternary_peers.py: a comparison with something that computes nonsense, or stores too much, would say nothing."""

from __future__ import annotations

import sys

import pytest
import ternary_peers
import torch
from ternary_peers import FLAGS, PREPARED, Prepared, encode, size_in_bytes

OWN = ("own bf16", "own 2-bit", "QMoE code", "QMoE code, int8 tokens")
INT8 = ("own 2-bit", "QMoE code, int8 tokens", "bitsandbytes int8", "llama.cpp TQ1_0", "llama.cpp TQ2_0")
OTHERS = tuple(name for name in PREPARED if name not in OWN)
SHAPES = ((3, 37, 101, 7, 2), (1, 1, 1, 1, 1), (2, 66, 30, 1, 5), (4, 9, 513, 23, 1), (2, 3, 256, 4, 2), (2, 130, 64, 2, 1))
WITHOUT_VECTORS = tuple(flag for flag in FLAGS if flag != "-march=native")
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=[FLAGS, WITHOUT_VECTORS], ids=["native", "without_vectors"])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own peers as this machine runs them, and as machines without AVX-512 do."""
    monkeypatch.setattr(ternary_peers, "FLAGS", request.param)


def _trits(zeros: float, *shape: int) -> torch.Tensor:
    uniform = torch.rand(shape)
    return ((uniform > zeros).byte() + (uniform > (1 + zeros) / 2).byte() * 254).view(torch.int8)  # 1 + 254 is -1


def _arguments(shape: tuple[int, ...], zeros: float = 0.885) -> Arguments:
    """Tokens that are whole numbers, the largest 127, times a power of two of each token: int8 and bfloat16 hold them."""
    experts, rows, columns, tokens, choices = shape
    x = torch.randint(-127, 128, (tokens, columns)).float()
    x[:, 0] = 127
    x *= 2.0 ** torch.arange(tokens)[:, None].remainder(5)
    scales = (0.5 + torch.rand(experts, rows)).bfloat16().float()
    return x, torch.randint(0, experts, (tokens, choices)), _trits(zeros, experts, rows, columns), scales


def _oracle(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tkrc,tc->tkr", (trits.double() * scales.double()[..., None])[ids], x.double())


def _prepare(name: str, arguments: Arguments) -> Prepared:
    try:
        return PREPARED[name](*arguments)
    except ValueError as why:
        pytest.skip(str(why))


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("zeros", [0.885, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_whole_numbers_are_multiplied_exactly(name: str, shape: tuple[int, ...], zeros: float) -> None:
    arguments = _arguments(shape, zeros)
    torch.testing.assert_close(PREPARED[name](*arguments)().double(), _oracle(*arguments), rtol=1e-6, atol=1e-3)


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("name", OWN)
def test_every_trit_comes_back(name: str) -> None:
    """Tokens that are unit vectors read the weights out, column by column."""
    trits, columns = _trits(0.9, 2, 19, 301), 301
    ids = torch.arange(2).repeat(columns, 1)
    got = PREPARED[name](torch.eye(columns), ids, trits, torch.ones(2, 19))()
    torch.testing.assert_close(got, trits.permute(2, 0, 1).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PREPARED)
def test_within_the_rounding_of_its_operands(name: str) -> None:
    _, ids, trits, scales = _arguments((5, 96, 768, 6, 3))
    x = torch.randn(6, 768)
    run = _prepare(name, (x, ids, trits, scales))
    step = x.abs().amax(1).double() / 127 if name in INT8 else x.abs().amax(1).double() / 128
    if name == "QMoE code":
        step *= 1e-4
    terms = trits.ne(0).sum(2).double()[ids] * scales.double()[ids]
    error, oracle = (run().double() - _oracle(x, ids, trits, scales)).abs(), _oracle(x, ids, trits, scales)
    assert (error <= step[:, None, None] / 2 * terms + oracle.abs() / 128).all()  # results may be bfloat16


@pytest.mark.parametrize("name", OTHERS)
def test_those_of_others_do_what_ours_do(name: str) -> None:
    arguments = _arguments((3, 64, 512, 5, 2))
    oracle = _oracle(*arguments)
    error = (_prepare(name, arguments)().double() - oracle).abs().amax((1, 2))
    assert (error <= 0.02 * oracle.abs().amax((1, 2))).all()


@pytest.mark.parametrize("name", OWN)
def test_threads_do_not_matter(name: str) -> None:
    arguments = _arguments((3, 131, 96, 9, 2))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(PREPARED[name](*arguments)().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("zeros", "bits"), [(0.80, 1.131), (0.85, 0.883), (0.885, 0.745), (0.90, 0.698), (0.93, 0.629), (0.95, 0.602)]
)
def test_the_dictionary_is_as_small_as_qmoes(zeros: float, bits: float) -> None:
    """Bits per weight with 64 per row, as a simulation of the published code has them."""
    trits = _trits(zeros, 1, 512, 6144)
    sizes = size_in_bytes(trits)
    for name in ("QMoE code", "QMoE code, int8 tokens"):
        assert sizes[name] * 8 / trits.numel() == pytest.approx(bits, rel=0.01)
    assert encode(trits)[1][-1] == (sizes[name] - 512 * 8) // 2


def test_sizes_are_of_what_is_kept() -> None:
    trits = _trits(0.885, 3, 64, 512)
    sizes = {name: size * 8 / trits.numel() for name, size in size_in_bytes(trits).items()}
    assert set(sizes) == set(PREPARED)
    assert (sizes["torch bf16"], sizes["llama.cpp TQ1_0"], sizes["llama.cpp TQ2_0"]) == (16, 1.6875, 2.0625)
    assert sizes["own 2-bit"] == 2 + 32 / 512
    assert (sizes["bitsandbytes NF4"], sizes["bitsandbytes int8"]) == (4.25, 8 + 32 / 512)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments((2, 33, 100, 1, 1))
    for bad in (-1, 2):
        with pytest.raises(ValueError, match="an expert for each choice"):
            PREPARED["own bf16"](arguments[0], torch.tensor([[bad]]), *arguments[2:])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("bitsandbytes NF4", "bitsandbytes int8"):
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            PREPARED[name](*arguments)
    monkeypatch.setattr(ternary_peers.llama_cpp, "_library", lambda: "not installed")
    with pytest.raises(ValueError, match=r"llama\.cpp TQ1_0: not installed"):
        PREPARED["llama.cpp TQ1_0"](*arguments)
