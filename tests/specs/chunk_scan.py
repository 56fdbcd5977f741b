"""chunk_scan: sums in float32 whatever the order, one rounding at the store; states are sums too."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specs import Args, Bad, Case, Spec

CASES = (
    Case("ssd", {"B": 2, "L": 70, "G": 1, "H": 2, "K": 24, "V": 16}, {"gain": True, "skip": True}),
    Case("tails", {"B": 2, "L": 67, "G": 2, "H": 4, "K": 19, "V": 21}, {"gain": True, "skip": True, "initial": True}),
    Case("retention", {"B": 1, "L": 130, "G": 2, "H": 2, "K": 32, "V": 48}, {"decay": "constant", "initial": True}),
    Case("delta", {"B": 2, "L": 70, "G": 1, "H": 2, "K": 32, "V": 16}, {"beta": True, "l2norm": True, "initial": True}),
    Case("kda", {"B": 1, "L": 97, "G": 2, "H": 2, "K": 32, "V": 35}, {"beta": True, "l2norm": True, "decay": "channel"}),
    Case("gla", {"B": 1, "L": 75, "G": 1, "H": 2, "K": 24, "V": 17}, {"decay": "channel", "initial": True}),
    Case("packed_ssd", {"B": 1, "L": 150, "G": 1, "H": 2, "K": 16, "V": 16}, {"gain": True, "packed": (0, 0, 65, 66, 150)}),
    Case("packed_delta", {"B": 1, "L": 150, "G": 1, "H": 2, "K": 16, "V": 16}, {"beta": True, "packed": (0, 64, 64, 150)}),
    Case("no_steps", {"B": 2, "L": 0, "G": 1, "H": 2, "K": 8, "V": 8}, {"initial": True}),
    Case("one_step", {"B": 2, "L": 1, "G": 1, "H": 2, "K": 24, "V": 16}, {"beta": True, "initial": True}),
    Case("no_heads", {"B": 2, "L": 5, "G": 0, "H": 0, "K": 8, "V": 8}),
    Case("no_batch", {"B": 0, "L": 5, "G": 1, "H": 2, "K": 8, "V": 8}),
    Case("one_by_one", {"B": 1, "L": 9, "G": 1, "H": 3, "K": 1, "V": 1}, {"gain": True}),
    Case("extreme", {"B": 1, "L": 90, "G": 1, "H": 2, "K": 16, "V": 16}, {"gain": True, "decay": "extreme"}),
    Case(
        "extreme_delta", {"B": 1, "L": 90, "G": 1, "H": 2, "K": 16, "V": 16}, {"beta": True, "l2norm": True, "decay": "extreme"}
    ),
    Case(
        "extreme_kda",
        {"B": 1, "L": 90, "G": 1, "H": 2, "K": 16, "V": 16},
        {"beta": True, "l2norm": True, "decay": "extreme_channel"},
    ),
    # Every form of the CUDA kernel: two slices of V, several panels of K with odd tails, bounds anywhere in a chunk.
    Case("wide_ssd", {"B": 2, "L": 33, "G": 1, "H": 2, "K": 20, "V": 34}, {"gain": True, "skip": True, "initial": True}),
    Case("wide_delta", {"B": 1, "L": 40, "G": 1, "H": 2, "K": 35, "V": 69}, {"beta": True, "l2norm": True}),
    Case(
        "wide_gla",
        {"B": 1, "L": 37, "G": 2, "H": 2, "K": 37, "V": 66},
        {"gain": True, "l2norm": True, "decay": "channel", "initial": True},
    ),
    Case(
        "wide_kda",
        {"B": 2, "L": 34, "G": 2, "H": 2, "K": 33, "V": 36},
        {"beta": True, "l2norm": True, "decay": "channel", "initial": True},
    ),
    Case("deep_ssd", {"B": 1, "L": 35, "G": 1, "H": 1, "K": 131, "V": 35}, {"gain": True, "skip": True, "initial": True}),
    Case("deep_delta", {"B": 1, "L": 36, "G": 1, "H": 1, "K": 133, "V": 34}, {"beta": True, "packed": (0, 3, 36)}),
    Case("deep_gla", {"B": 1, "L": 34, "G": 1, "H": 1, "K": 130, "V": 33}, {"decay": "channel", "packed": (0, 33, 34)}),
    Case("deep_kda", {"B": 1, "L": 33, "G": 1, "H": 1, "K": 129, "V": 9}, {"beta": True, "l2norm": True, "decay": "channel"}),
    Case(
        "packed_kda",
        {"B": 1, "L": 75, "G": 1, "H": 2, "K": 18, "V": 20},
        {"beta": True, "l2norm": True, "decay": "channel", "packed": (0, 5, 5, 40, 75), "initial": True},
    ),
    Case("widest", {"B": 1, "L": 20, "G": 1, "H": 1, "K": 256, "V": 512}, {"gain": True}),
    Case("mamba2_130m", {"B": 1, "L": 1024, "G": 1, "H": 24, "K": 128, "V": 64}, {"gain": True, "skip": True}, bench=True),
    Case("mamba2_8b", {"B": 1, "L": 1024, "G": 8, "H": 128, "K": 128, "V": 64}, {"gain": True, "skip": True}, bench=True),
    Case("llama_cpp_2048", {"B": 1, "L": 2048, "G": 1, "H": 32, "K": 128, "V": 64}, {"gain": True}, bench=True),
    Case("qwen3_next", {"B": 1, "L": 1024, "G": 16, "H": 32, "K": 128, "V": 128}, {"beta": True, "l2norm": True}, bench=True),
    Case(
        "kimi_linear",
        {"B": 1, "L": 1024, "G": 32, "H": 32, "K": 128, "V": 128},
        {"beta": True, "l2norm": True, "decay": "channel"},
        bench=True,
    ),
)


def _decay(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Log decays: of about half a chunk's memory, the same for all steps, or with steps that forget everything."""
    if kind == "constant":
        return torch.log1p(-torch.exp2(-5 - torch.arange(shape[2], dtype=torch.float32))).expand(shape[:3])
    d = -torch.rand(shape, generator=generator) * 0.2
    if kind.startswith("extreme"):
        d = torch.where(torch.rand(shape, generator=generator) < 0.1, -1e4, d)
        d[:, 40] = float("-inf")
    return d


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, L, G, H, K, V = (case.sizes[k] for k in "BLGHKV")
    option = case.options.get
    kind = str(option("decay", "scalar"))
    q, k = (torch.randn(B, L, G, K, generator=generator).to(dtype) for _ in "qk")
    v = torch.randn(B, L, H, V, generator=generator).to(dtype)
    d = _decay(kind, (B, L, H, K) if kind.endswith("channel") else (B, L, H), generator)
    gain = torch.rand(B, L, H, generator=generator) if option("gain") else None
    # Without l2norm a write overshoots, and the state grows, unless β·|k|² stays below 2.
    beta = torch.rand(B, L, H, generator=generator) / (1 if option("l2norm") else 2 * K) if option("beta") else None
    skip = torch.randn(H, generator=generator) if option("skip") else None
    packed = option("packed")
    cu_seqlens = torch.tensor(packed, dtype=torch.int32) if packed else None
    sequences = len(packed) - 1 if packed else B
    initial = torch.randn(sequences, H, K, V, generator=generator) if option("initial") else None
    return q, k, v, d, gain, beta, skip, initial, cu_seqlens, K**-0.5, bool(option("l2norm", False))


def _flops(case: Case) -> float:
    B, L, H, K, V = (case.sizes[k] for k in "BLHKV")
    return B * L * H * ((6.0 if case.options.get("beta") else 4.0) * K * V + 64.0 * (K + V))


def _bytes(case: Case, dtype: torch.dtype) -> float:
    B, L, G, H, K, V = (case.sizes[k] for k in "BLGHKV")
    return float(B * L * (2 * G * K + 2 * H * V) * dtype.itemsize + 4 * B * H * K * V)


def prepare_transformers(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    skip: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    l2norm: bool,
) -> Callable[[], torch.Tensor]:
    """Mamba-2's scan as transformers has it: C, B and x for q, k and v; Δ = gain and A = log_decay/gain."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    if beta is not None or cu_seqlens is not None or l2norm or gain is None or log_decay.dim() == 4:
        raise ValueError("transformers: scalar decays and gains only")
    A, C = log_decay / gain, q * scale
    start = None if initial_state is None else initial_state.mT
    return lambda: mamba2_chunk_scan(v, gain, A, k, C, 256, D=skip, initial_states=start, return_final_states=True)[0]


def _prepare_delta(module: str, function: str, channel: bool, *args: Any) -> Callable[[], torch.Tensor]:
    q, k, v, log_decay, _, beta, skip, initial_state, cu_seqlens, scale, l2norm = args
    if beta is None or skip is not None or cu_seqlens is not None or scale != q.shape[3] ** -0.5:
        raise ValueError(f"{function}: delta rules with attention's scale only")
    if (log_decay.dim() == 4) != channel or (channel and q.shape[2] != v.shape[2]):
        raise ValueError(f"{function}: {'decays per channel, and no groups,' if channel else 'scalar decays'} only")
    run = getattr(importlib.import_module(f"transformers.models.{module}"), function)
    options = {"initial_state": initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": l2norm}
    return lambda: run(q, k, v, log_decay, beta, **options)[0]


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="chunk_scan",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction", "reduction"),
    flops=_flops,
    bytes=_bytes,
    opaque=(8,),
    prepared={
        "transformers": prepare_transformers,
        "transformers, GDN": partial(_prepare_delta, "qwen3_5.modeling_qwen3_5", "torch_chunk_gated_delta_rule", False),
        "transformers, KDA": partial(_prepare_delta, "kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention", True),
    },
    bad=(
        Bad("rank", lambda a: a.__setitem__(2, a[2][0]), ValueError, "(B, L, H, V)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("mixed", lambda a: a.__setitem__(0, a[0].half()), TypeError, "float16"),
        Bad("keys", lambda a: a.__setitem__(1, a[1][:, 1:]), ValueError, "q and k of shape (B, L, G, K) = (2, 70, G, K)"),
        Bad("groups", lambda a: a.__setitem__(slice(0, 2), [a[0].expand(2, 70, 3, 24)] * 2), ValueError, "G = 3"),
        Bad("decay", lambda a: a.__setitem__(3, a[3][:, :1]), ValueError, "log_decay of shape (B, L, H) = (2, 70, 2)"),
        Bad("both", lambda a: a.__setitem__(5, a[4]), ValueError, "gain or beta"),
        Bad("gain_dtype", lambda a: a.__setitem__(4, a[4].half()), TypeError, "float32"),
        Bad("state", _set(7, torch.zeros(2, 2, 24, 15)), ValueError, "(2, 2, 24, 15)"),
        Bad("packed_batch", _set(8, torch.tensor([0, 70], dtype=torch.int32)), ValueError, "batch of 1"),
        Bad("head_size", lambda a: a.__setitem__(slice(0, 2), [torch.zeros(2, 70, 1, 257)] * 2), ValueError, "K = 257"),
    ),
)
