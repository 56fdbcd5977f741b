"""Peers of a product with sub-1-bit ternary weights: our own in bench/native, and what torch, bitsandbytes and llama.cpp offer.

``PREPARED`` holds functions for :attr:`specs.Spec.prepared`: of tokens x (T, C), experts ids (T, K), trits (E, R, C) in
{-1, 0, 1} and scales (E, R), they return what to time. That returns (T, K, R): x[t] times the trits of expert ids[t, k] times
its scales. It may overwrite the result of its last call.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import c_int, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import llama_cpp
import torch

from effvlm._info import cpu_name

NATIVE = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
BLOCK = 256  # columns of a block of 2-bit weights, in our own layout and in llama.cpp's
NF4_BLOCK = 64  # weights that share a scale
TERNARY = {34: "TQ1_0", 35: "TQ2_0"}  # enum ggml_type

Prepared = Callable[[], torch.Tensor]
Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Prepared]


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "out")),
        *((name, c_int64) for name in ("tokens", "choices", "experts", "rows", "columns", "threads")),
    )


@cache
def library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """bench/native, compiled for this machine and kept for its user."""
    sources = sorted(NATIVE.glob("ternary_peers*"))
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + " ".join((*flags, cpu_name())).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"effvlm-peers-{os.getuid()}" / f"{key}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        new = target.with_suffix(f".{os.getpid()}")
        command = ["c++", *flags, str(NATIVE / "ternary_peers.cpp"), "-o", str(new), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ValueError("own peers: need a C++ compiler, found no c++") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(new, target)
    loaded = ctypes.CDLL(str(target))
    loaded.peer_encode.restype = c_int64
    loaded.peer_encode.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p)
    for name, weights in {"bf16": (c_void_p, c_int64), "two_bit": (c_void_p,) * 2, "codes_f32": (c_void_p,) * 3}.items():
        function = getattr(loaded, f"peer_{name}")
        function.restype, function.argtypes = None, (ctypes.POINTER(_Call), *weights)
    loaded.peer_codes_int8.restype, loaded.peer_codes_int8.argtypes = None, loaded.peer_codes_f32.argtypes
    return loaded


def _own(name: str, x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, *weights: torch.Tensor | int) -> Prepared:
    """``peer_<name>`` of bench/native with everything in place; activations are converted in each call."""
    experts, rows, columns = trits.shape
    if ((ids < 0) | (ids >= experts)).any():
        raise ValueError("own peers: need an expert for each choice")
    tokens, chosen, out = x.float().contiguous(), ids.contiguous(), torch.empty(*ids.shape, rows)
    places = (t.data_ptr() for t in (tokens, chosen, out))
    call = _Call(*places, *ids.shape, experts, rows, columns, torch.get_num_threads())
    function = getattr(library(FLAGS), f"peer_{name}")
    kept = (tokens, chosen, *weights)  # memory that the call reads

    def run() -> torch.Tensor:
        function(call, *(w.data_ptr() if isinstance(w, torch.Tensor) else w for w in kept[2:]))
        return out

    return run


def own_bf16(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> Prepared:
    """Weights and tokens in bfloat16, rows padded to whole vectors."""
    padded = torch.nn.functional.pad(_dequantised(trits, scales), (0, -trits.shape[2] % 64))
    return _own("bf16", x, ids, trits, padded, padded.shape[2])


def own_two_bit(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> Prepared:
    """Trits in two bits, tokens in int8 with a scale each."""
    codes = torch.nn.functional.pad(trits + 1, (0, -trits.shape[2] % BLOCK), value=1).to(torch.uint8)
    quarter = codes.unflatten(2, (-1, 4, BLOCK // 4)).unbind(3)
    packed = (quarter[0] | quarter[1] << 2 | quarter[2] << 4 | quarter[3] << 6).contiguous()
    return _own("two_bit", x, ids, trits, packed, scales.float().contiguous())


def encode(trits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codewords of QMoE's dictionary for trits (E, R, C); where each of the E·R rows begins, and the last ends."""
    experts, rows, columns = trits.shape
    most = experts * rows * ((columns + 1) // 2)
    if most >= 2**31:
        raise ValueError("QMoE: rows begin at 32-bit offsets, these weights are too many")
    codes, offsets = torch.empty(most, dtype=torch.int16), torch.empty(experts * rows + 1, dtype=torch.int32)
    count = library(FLAGS).peer_encode(
        trits.contiguous().data_ptr(), experts * rows, columns, codes.data_ptr(), offsets.data_ptr()
    )
    return codes[:count].clone(), offsets


def qmoe(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor, *, tokens: str) -> Prepared:
    """The dictionary code, decoded in the product; ``tokens`` in ``"f32"`` or ``"int8"``."""
    codes, offsets = encode(trits)
    levels = torch.stack((-scales, scales), -1).bfloat16()
    return _own(f"codes_{tokens}", x, ids, trits, codes, offsets, levels)


def _dequantised(trits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """In bfloat16, one expert at a time: they may be gigabytes."""
    weights = torch.empty(trits.shape, dtype=torch.bfloat16)
    for e, scale in enumerate(scales):
        torch.mul(trits[e], scale[:, None].bfloat16(), out=weights[e])
    return weights


def _per_expert(x: torch.Tensor, ids: torch.Tensor, product: Callable[[torch.Tensor, int], torch.Tensor]) -> Prepared:
    """``product(tokens, expert)``, once for every expert that has tokens."""
    slots = [(e, (ids.flatten() == e).nonzero()[:, 0]) for e in ids.unique().tolist()]
    given = [(x[slot // ids.shape[1]].contiguous(), e) for e, slot in slots]
    order = torch.cat([slot for _, slot in slots]).argsort()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([product(*one) for one in given])[order].unflatten(0, ids.shape)

    return run


def torch_bf16(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> Prepared:
    """Dense weights and tokens in bfloat16."""
    weights = _dequantised(trits, scales)
    return _per_expert(x.bfloat16(), ids, lambda tokens, e: torch.nn.functional.linear(tokens, weights[e]))


def _bitsandbytes() -> Any:
    """The package, or ValueError with what to install. It warns of an optional kernel on import."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("bitsandbytes: not installed (pip install bitsandbytes)") from None
    return bitsandbytes


def bitsandbytes_nf4(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> Prepared:
    """Its 4-bit type (which has -1, 0 and 1) with a scale for 64 weights, as its linear layer packs it for this CPU."""
    bnb, (_, rows, columns) = _bitsandbytes(), trits.shape
    if rows % 32 or columns % NF4_BLOCK:
        raise ValueError(f"bitsandbytes NF4: needs multiples of 32 rows and {NF4_BLOCK} columns, got {rows} and {columns}")
    layers = []
    for weights in _dequantised(trits, scales):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        options = {"quant_type": "nf4", "compress_statistics": False, "blocksize": NF4_BLOCK, "requires_grad": False}
        layer.weight = bnb.nn.Params4bit(weights, **options).to("cpu")
        with torch.no_grad():
            layer.eval()(x[:1].bfloat16())  # packs
        layers.append(layer.weight)
    return _per_expert(x.bfloat16(), ids, lambda t, e: bnb.matmul_4bit(t, layers[e].data, quant_state=layers[e].quant_state))


def bitsandbytes_int8(x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> Prepared:
    """Weights in int8 with a scale per row, tokens with one each."""
    functional = _bitsandbytes().functional
    weights = [functional.int8_vectorwise_quant(w)[:2] for w in _dequantised(trits, scales)]

    def product(tokens: torch.Tensor, e: int) -> torch.Tensor:
        whole, scale, _ = functional.int8_vectorwise_quant(tokens)
        sums = functional.int8_linear_matmul(whole, weights[e][0])
        return torch.as_tensor(functional.int8_mm_dequant(sums, scale, weights[e][1]))

    return _per_expert(x.bfloat16(), ids, product)


class LlamaTernary(llama_cpp.Experts):
    """One of llama.cpp's ternary types in its product for routed experts.

    Args:
        kind: of ``enum ggml_type``. Those two have one layout only: ggml repacks neither.

    Raises:
        ValueError: why this cannot be.
    """

    def __init__(self, x: torch.Tensor, ids: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor, *, kind: int) -> None:
        (experts, rows, columns), (tokens, choices) = trits.shape, ids.shape
        self._open(f"llama.cpp {TERNARY[kind]}")
        if columns % BLOCK:
            raise ValueError(f"llama.cpp {TERNARY[kind]}: needs rows of a multiple of {BLOCK} weights, got {columns}")
        data = torch.empty(experts, rows * self._ggml.ggml_row_size(kind, columns), dtype=torch.uint8)
        for e in range(experts):
            wide = trits[e] * scales[e, :, None].float()
            self._ggml.ggml_quantize_chunk(kind, wide.data_ptr(), data[e].data_ptr(), 0, rows, columns, None)
        weights = self._in_place(data, kind, columns, rows, experts)
        inputs = self._in_place(x.float(), llama_cpp.F32, columns, 1, tokens)
        chosen = self._in_place(ids.int(), llama_cpp.I32, choices, tokens, 1)
        context = self._context(1, graph=True)
        self._graph = self._ggml.ggml_new_graph(context)
        product = self._ggml.ggml_mul_mat_id(context, weights, inputs, chosen)
        self._ggml.ggml_build_forward_expand(self._graph, product)
        self._result = torch.empty(tokens, choices, rows)
        memory = self._result.data_ptr(), self._result.nbytes
        buffer = self._own("ggml_backend_buffer_free", self._ggml.ggml_backend_cpu_buffer_from_ptr(*memory))
        self._ggml.ggml_backend_tensor_alloc(buffer, product, memory[0])

    def _open(self, name: str) -> None:
        """ggml's CPU backend with torch's number of threads."""
        library = llama_cpp._library()
        if isinstance(library, str):
            raise ValueError(f"{name}: {library}")
        self._ggml, self._owned = library, ExitStack()
        weakref.finalize(self, self._owned.close)
        self._device = library.ggml_backend_dev_by_type(llama_cpp.CPU)
        self._backend = self._own("ggml_backend_free", library.ggml_backend_dev_init(self._device, None))
        self._procedure("ggml_backend_set_n_threads", None, c_void_p, c_int)(self._backend, torch.get_num_threads())
        self._kept = []


PREPARED: dict[str, Prepare] = {
    "torch bf16": torch_bf16,
    "own bf16": own_bf16,
    "own 2-bit": own_two_bit,
    "QMoE code": partial(qmoe, tokens="f32"),
    "QMoE code, int8 tokens": partial(qmoe, tokens="int8"),
    "bitsandbytes NF4": bitsandbytes_nf4,
    "bitsandbytes int8": bitsandbytes_int8,
    **{f"llama.cpp {name}": partial(LlamaTernary, kind=kind) for kind, name in TERNARY.items()},
}


def size_in_bytes(trits: torch.Tensor) -> dict[str, int]:
    """What each peer keeps of trits (E, R, C) and their scales, by its name in ``PREPARED``."""
    experts, rows, columns = trits.shape
    count, all_rows = trits.numel(), experts * rows
    blocks = all_rows * -(-columns // BLOCK)
    coded = 2 * encode(trits)[0].numel() + 8 * all_rows  # a codeword is 16 bits, a row an offset and two bfloat16 levels
    return {
        **dict.fromkeys(("torch bf16", "own bf16"), 2 * count),
        "own 2-bit": blocks * BLOCK // 4 + 4 * all_rows,
        **dict.fromkeys(("QMoE code", "QMoE code, int8 tokens"), coded),
        "bitsandbytes NF4": count // 2 + 2 * (count // NF4_BLOCK),
        "bitsandbytes int8": count + 4 * all_rows,
        "llama.cpp TQ1_0": blocks * 54,
        "llama.cpp TQ2_0": blocks * 66,
    }
