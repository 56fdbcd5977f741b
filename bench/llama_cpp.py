"""llama.cpp as a peer of ``moe_ffn``: the graph that it builds for routed experts, on the ggml libraries of llama-cpp-python.

``python bench/llama_cpp.py`` says whether that can run here, and how far its results are from the reference.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial, reduce
from itertools import takewhile
from typing import Any, cast

import torch  # before ggml: libraries loaded later use the same OpenMP runtime, else threads of one spin while the other works

PACKAGE = "llama_cpp_python"
F32, Q4_K, I32 = 0, 12, 26  # enum ggml_type
NATIVE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
SUPERBLOCK = 256  # weights of a row that Q4_K quantises together
ALIGNMENT = 32  # of memory that ggml is given: it aborts the process otherwise
CPU = 0  # enum ggml_backend_dev_type

P = c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", P), ("no_alloc", c_bool))


_SIGNATURES: dict[tuple[Any, ...], str] = {  # what it returns and then takes: names
    (None, P): "ggml_free ggml_backend_free ggml_backend_buffer_free ggml_gallocr_free",
    (None, P, P, c_size_t, c_size_t): "ggml_backend_tensor_set",
    (None, P, P): "ggml_build_forward_expand ggml_log_set",
    (P, _InitParams): "ggml_init",
    (P, c_int): "ggml_backend_dev_by_type",
    (P, P): "ggml_backend_dev_backend_reg ggml_backend_dev_buffer_type ggml_gallocr_new ggml_get_data ggml_new_graph",
    (P, P, P): "ggml_backend_alloc_ctx_tensors_from_buft ggml_swiglu",
    (P, P, P, P): "ggml_add ggml_mul",
    (P, P, P, P, P): "ggml_mul_mat_id",
    (P, P, P, P, P, P, P, P, P, c_int64): "ggml_ssm_scan",
    (P, P, P, c_int64, c_int64, c_size_t, c_size_t): "ggml_view_2d",
    (P, P, c_char_p): "ggml_backend_dev_init ggml_backend_reg_get_proc_address",
    (P, P, c_int, c_int64, c_int64, c_int64): "ggml_new_tensor_3d",
    (P, P, c_int, c_int64, c_int64, c_int64, c_int64): "ggml_new_tensor_4d",
    (P, P, c_size_t): "ggml_backend_cpu_buffer_from_ptr",
    (c_bool, P, P): "ggml_backend_dev_supports_op ggml_gallocr_alloc_graph",
    (c_int, P, P): "ggml_backend_graph_compute",
    (c_int, P, P, P): "ggml_backend_tensor_alloc",
    (c_size_t,): "ggml_graph_overhead ggml_tensor_overhead",
    (c_size_t, c_int, P, P, c_int64, c_int64, c_int64, P): "ggml_quantize_chunk",
    (c_size_t, c_int, c_int64): "ggml_row_size",
}
_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, P)(lambda *_: None)  # ggml calls it as long as the process lives


@cache
def _library() -> ctypes.CDLL | str:
    """ggml with its functions declared, or why there is none."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install llama-cpp-python)"
    path = str(package.locate_file(f"llama_cpp/lib/libggml.{'dylib' if sys.platform == 'darwin' else 'so'}"))
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"cannot load ggml of llama-cpp-python {package.version}: {error}"
    for (result, *taken), names in _SIGNATURES.items():
        for name in names.split():
            if (function := getattr(library, name, None)) is None:
                return f"llama-cpp-python {package.version} has no {name}"
            function.restype, function.argtypes = result, taken
    library.ggml_log_set(_SILENT, None)
    if not library.ggml_backend_dev_by_type(CPU):
        return f"llama-cpp-python {package.version} has no CPU backend"
    return library


def why_not(*args: Any, quantised: bool = False) -> str:
    """Why these arguments of ``moe_ffn`` cannot be given to llama.cpp (without any: why nothing can); empty if they can."""
    library = _library()
    if isinstance(library, str):
        return library
    if not args:
        return ""
    x, ids, _, up, up_bias, down, down_bias, *gate = args
    if x.device.type != "cpu":
        return "compared on CPU only"
    if up_bias is not None or down_bias is not None or gate != ["silu", True, False, 1.0, math.inf, 0.0]:
        return "compared for plain silu gates without biases only"
    if not x.numel() or not ids.numel() or bool(((ids < 0) | (ids >= len(up))).any()):
        return "needs tokens, and an expert for each of their choices"
    if quantised and (up.shape[2] % SUPERBLOCK or down.shape[2] % SUPERBLOCK):
        return f"needs rows of a multiple of {SUPERBLOCK} weights, got {up.shape[2]} and {down.shape[2]}"
    return ""


class Graph:
    """A graph of ggml on its CPU backend, with torch's number of threads; calling it computes it and returns ``_result``."""

    _graph: int
    _result: torch.Tensor

    def __init__(self) -> None:
        library = cast(ctypes.CDLL, _library())
        self._ggml, self._owned = library, ExitStack()
        weakref.finalize(self, self._owned.close)
        self._device = library.ggml_backend_dev_by_type(CPU)
        self._default = library.ggml_backend_dev_buffer_type(self._device)
        self._backend = self._own("ggml_backend_free", library.ggml_backend_dev_init(self._device, None))
        self._procedure("ggml_backend_set_n_threads", None, P, c_int)(self._backend, torch.get_num_threads())
        self._kept: list[torch.Tensor] = []  # memory of torch that ggml reads

    def __call__(self) -> torch.Tensor:
        if status := self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError(f"llama.cpp: expected ggml to compute the graph, got status {status}")
        return self._result

    def _in_place(self, data: torch.Tensor, kind: int, *sizes: int) -> int:
        """A tensor of ggml in memory of torch; ``sizes`` innermost first."""
        ggml = self._ggml
        data = data.clone(memory_format=torch.contiguous_format) if data.data_ptr() % ALIGNMENT else data.contiguous()
        self._kept.append(data)
        make = ggml.ggml_new_tensor_3d if len(sizes) == 3 else ggml.ggml_new_tensor_4d
        tensor = make(self._context(1), kind, *sizes)
        buffer = self._own("ggml_backend_buffer_free", ggml.ggml_backend_cpu_buffer_from_ptr(data.data_ptr(), data.nbytes))
        ggml.ggml_backend_tensor_alloc(buffer, tensor, data.data_ptr())
        return int(tensor)

    def _procedure(self, name: str, result: Any, *taken: Any) -> Callable[..., Any]:
        """What a backend exports by name only, since the backend may be a library of its own."""
        registry = self._ggml.ggml_backend_dev_backend_reg(self._device)
        return ctypes.CFUNCTYPE(result, *taken)(self._ggml.ggml_backend_reg_get_proc_address(registry, name.encode()))

    def _context(self, tensors: int, *, graph: bool = False) -> int:
        size = tensors * self._ggml.ggml_tensor_overhead() + graph * self._ggml.ggml_graph_overhead()
        return self._own("ggml_free", self._ggml.ggml_init(_InitParams(size, None, True)))

    def _own(self, free: str, pointer: int | None) -> int:
        if not pointer:
            raise MemoryError(f"llama.cpp: expected something to {free}, got nothing")
        self._owned.callback(getattr(self._ggml, free), pointer)
        return pointer


class Experts(Graph):
    """A call of ``moe_ffn`` in ggml: llama.cpp's graph for routed experts, with inputs and weights in place.

    Calling it computes the graph only and returns (T, O) in float32, in memory that the next call overwrites: inside llama.cpp
    nothing is converted or copied either. Weights are read where they are, or from a copy where they are quantised or repacked.

    Args:
        args: of ``moe_ffn``, in the order of its schema.
        quantised: weights as Q4_K instead of in their own type.
        repack: let ggml interleave the rows of quantised weights, as llama.cpp does unless told ``--no-repack``. It is not always
            faster: many tokens per expert have a kernel for the plain layout only.

    Raises:
        ValueError: "llama.cpp: " or "llama.cpp Q4_K: " and :func:`why_not`'s reason.
    """

    def __init__(self, *args: Any, quantised: bool = False, repack: bool = True) -> None:
        if reason := why_not(*args, quantised=quantised):
            raise ValueError(f"llama.cpp{' Q4_K' * quantised}: {reason}")
        super().__init__()
        x, ids, weight, up, _, down, *_ = args
        (tokens, choices), out = ids.shape, down.shape[1]
        weights = [self._weights(w, quantised, repack) for w in (up, down)]
        inputs = [
            self._in_place(x.float(), F32, x.shape[1], 1, tokens),
            self._in_place(ids.int(), I32, choices, tokens, 1),
            self._in_place(weight, F32, 1, choices, tokens),
        ]
        self._graph, result = self._build(weights, inputs, tokens, choices, out)
        memory = (ctypes.c_float * (tokens * out)).from_address(self._ggml.ggml_get_data(result))
        self._result = torch.frombuffer(memory, dtype=torch.float32).view(tokens, out)

    def _build(self, weights: list[int], inputs: list[int], tokens: int, choices: int, out: int) -> tuple[int, int]:
        """The nodes of llama.cpp's ``build_moe_ffn`` for merged gate and up weights, after its routing."""
        ggml, (up, down), (x, ids, weight) = self._ggml, weights, inputs
        context = self._context(4 + 2 * choices, graph=True)
        graph = ggml.ggml_new_graph(context)
        inner = ggml.ggml_swiglu(context, ggml.ggml_mul_mat_id(context, up, x, ids))
        made = ggml.ggml_mul(context, ggml.ggml_mul_mat_id(context, down, inner, ids), weight)
        ggml.ggml_build_forward_expand(graph, made)
        row = out * torch.float32.itemsize
        parts = (ggml.ggml_view_2d(context, made, out, tokens, choices * row, k * row) for k in range(choices))
        result = reduce(partial(ggml.ggml_add, context), parts)
        ggml.ggml_build_forward_expand(graph, result)
        allocator = self._own("ggml_gallocr_free", ggml.ggml_gallocr_new(self._default))
        if not ggml.ggml_gallocr_alloc_graph(allocator, graph):
            raise MemoryError("llama.cpp: no memory for the graph")
        return graph, result

    def _weights(self, weights: torch.Tensor, quantised: bool, repack: bool) -> int:
        """(E, R, C) → the same in ggml, in the first layout in which this CPU can multiply by it."""
        ggml, (experts, rows, columns) = self._ggml, weights.shape
        data, kind = (self._quantise(weights), Q4_K) if quantised else (weights.contiguous(), NATIVE[weights.dtype])
        layouts = self._procedure("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(P), P)(self._device)
        for layout in takewhile(bool, layouts) if repack else ():
            context = self._context(4)
            tensor = ggml.ggml_new_tensor_3d(context, kind, columns, rows, experts)
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
            x, ids = (ggml.ggml_new_tensor_3d(context, *s, 1, 1) for s in ((F32, columns), (I32, 1)))
            product = ggml.ggml_mul_mat_id(context, tensor, x, ids)
            if buffer and ggml.ggml_backend_dev_supports_op(self._device, product):
                self._own("ggml_backend_buffer_free", buffer)
                ggml.ggml_backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
                return int(tensor)
            ggml.ggml_backend_buffer_free(buffer)
        return self._in_place(data, kind, columns, rows, experts)

    def _quantise(self, weights: torch.Tensor) -> torch.Tensor:
        experts, rows, columns = weights.shape
        data = torch.empty(experts, rows * self._ggml.ggml_row_size(Q4_K, columns), dtype=torch.uint8)

        def one(e: int) -> None:
            wide = weights[e].float().contiguous()
            self._ggml.ggml_quantize_chunk(Q4_K, wide.data_ptr(), data[e].data_ptr(), 0, rows, columns, None)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(one, range(experts)))
        return data


def main() -> None:
    """How far llama.cpp is from the reference in float64, relative to the largest output; Q4_K's weights differ, too."""
    from effvlm.ops.moe_ffn import reference

    if reason := why_not():
        sys.exit(f"llama.cpp: {reason}")
    torch.manual_seed(0)
    x, weight, ids = torch.randn(9, 512), torch.rand(9, 2), torch.rand(9, 8).topk(2).indices
    up, down = torch.randn(8, 512, 512) / 23, torch.randn(8, 512, 256) / 16
    for dtype, quantised in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        tail = ("silu", True, False, 1.0, math.inf, 0.0)
        args = (x.to(dtype), ids, weight, up.to(dtype), None, down.to(dtype), None, *tail)
        (oracle,) = reference(args[0].double(), *args[1:])
        error = (Experts(*args, quantised=quantised)().double() - oracle).abs().max() / oracle.abs().max()
        print(f"llama.cpp, {'Q4_K' if quantised else dtype}: error {error:.1e}")


if __name__ == "__main__":
    main()
