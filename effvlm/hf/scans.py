"""The scan functions of transformers' modeling files, by their names and with their parameters, on our ops.

transformers writes every Mamba-like mixer against the same eleven functions (``use_kernel_func_from_hub_with_fallback``), whose
names and parameters are those of the ``mamba_ssm``, ``causal_conv1d`` and ``fla`` packages. Here is one of ours for each of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from effvlm._library import FLOATS, say_once
from effvlm.ops.causal_conv1d import causal_conv1d
from effvlm.ops.chunk_scan import chunk_scan, discretize
from effvlm.ops.selective_scan import selective_scan
from effvlm.ops.state_update import delta_update, state_update

Tensor = torch.Tensor
_FUSED = (None, "silu", "swish")  # the activations that causal_conv1d knows


def why_not(x: Tensor) -> str:
    """Why our ops do not take a tensor like ``x``; empty when they do."""
    if x.dtype not in FLOATS:
        return f"effvlm has no scans in {str(x.dtype).removeprefix('torch.')}"
    return "" if x.device.type in ("cpu", "cuda", "meta") else f"effvlm has no scans on {x.device.type}"


def _bounds(x: Tensor, said: dict[str, Any]) -> Tensor | None:
    """Where packed sequences begin and end, int32, from either keyword that says it; ``x`` is for its batch alone."""
    cu_seqlens: Tensor | None = said.get("cu_seqlens")
    seq_idx: Tensor | None = said.get("seq_idx")
    if cu_seqlens is not None or seq_idx is None:
        return None if cu_seqlens is None else cu_seqlens.to(torch.int32)
    if len(x) != 1:
        raise ValueError(f"effvlm: expected packed sequences (seq_idx) in a batch of 1, got a batch of {len(x)}")
    changes = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero()[:, 0] + 1
    ends = changes.new_tensor([0]), changes, changes.new_tensor([seq_idx.shape[1]])
    return torch.cat(ends).to(torch.int32)


def _activation(name: str, out: Tensor) -> Tensor:
    from transformers.activations import ACT2FN

    return ACT2FN[name](out)  # type: ignore[no-any-return]


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, D, L) → (B, D, L)."""
    x = hidden_states if weight.dtype == torch.float32 else hidden_states.to(weight.dtype)
    fused = activation if activation in _FUSED else None
    out = causal_conv1d(x, weight, bias, cu_seqlens=_bounds(x, kwargs), activation=fused)
    return (out if activation in _FUSED else _activation(str(activation), out)).to(hidden_states.dtype)


def causal_conv1d_update(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """(B, D, 1) → (B, D, 1), ``conv_state`` moved on in place."""
    x = hidden_states if weight.dtype == torch.float32 else hidden_states.to(weight.dtype)
    fused = activation if activation in _FUSED else None
    out = causal_conv1d(x, weight, bias, state=conv_state, activation=fused)
    return (out if activation in _FUSED else _activation(str(activation), out)).to(hidden_states.dtype)


def selective_scan_fn(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1: (B, D, L) → (B, D, L), and its last state (B, D, N) in float32."""
    one = hidden_states.dtype
    dt, B, C = (x.to(one) for x in (dt, B, C))
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    z = None if z is None else z.to(one)
    out, last = selective_scan(hidden_states, dt, A.float(), B, C, D, z, delta_bias, delta_softplus)
    return (out, last) if return_last_state else out


def selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One step of Mamba-1 or Mamba-2, ``state`` moved on in place."""
    return state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def mamba_chunk_scan_combined(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2: (B, L, H, P) → (B, L, H, P), and its last state (B, H, P, N) in float32; chunks are of our own length."""
    one = hidden_states.dtype
    log_decay, gain = discretize(dt, A, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
    out, last = chunk_scan(
        C.to(one),
        B.to(one),
        hidden_states,
        log_decay,
        gain=gain,
        skip=None if D is None else D.float(),
        initial_state=None if initial_states is None else initial_states.float().mT,
        cu_seqlens=_bounds(hidden_states, kwargs),
    )
    if kwargs.get("z") is not None:
        out = out * torch.nn.functional.silu(kwargs["z"])
    return (out, last.mT) if return_final_states else out


def chunk_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (g per head) and KDA (g per channel): (B, L, H, V), and the last state (B, H, K, V) in float32."""
    one = value.dtype
    out, last = chunk_scan(
        query.to(one),
        key.to(one),
        value,
        g.float(),
        beta=beta.float(),
        scale=query.shape[-1] ** -0.5,
        l2norm=use_qk_l2norm_in_kernel,
        initial_state=None if initial_state is None else initial_state.float(),
        cu_seqlens=_bounds(value, kwargs),
    )
    return out.to(query.dtype), last if output_final_state else None


def recurrent_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same step by step. One step on a float32 state that is asked back moves on that very tensor: it is the cache's."""
    in_place = (
        value.shape[1] == 1
        and initial_state is not None
        and initial_state.dtype == torch.float32
        and output_final_state
        and kwargs.get("cu_seqlens") is None
        and not torch.is_grad_enabled()
    )
    if not in_place or initial_state is None:
        flags = (output_final_state, use_qk_l2norm_in_kernel)
        return chunk_delta_rule(query, key, value, g, beta, 64, initial_state, *flags, **kwargs)
    one = value.dtype
    step = (x[:, 0] for x in (query.to(one), key.to(one), value, g.float(), beta.float()))
    out = delta_update(initial_state, *step, l2norm=use_qk_l2norm_in_kernel)
    return out[:, None].to(query.dtype), initial_state


def no_fused_training(*args: Any, **kwargs: Any) -> None:
    """``mamba_inner_fn`` and its like: None sends transformers' mixers down the path of the single functions."""


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "selective_scan_fn": selective_scan_fn,
    "selective_state_update": selective_state_update,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_inner_fn": no_fused_training,
    "mamba_split_conv1d_scan_combined": no_fused_training,
    "chunk_gated_delta_rule": chunk_delta_rule,
    "fused_recurrent_gated_delta_rule": recurrent_delta_rule,
    "chunk_kda": chunk_delta_rule,
    "fused_recurrent_kda": recurrent_delta_rule,
}


def instead_of(name: str, original: Callable[..., Any], *, packaged: bool = False) -> Callable[..., Any]:
    """Ours under ``name``; ``original`` for tensors that ours does not take (said once).

    Args:
        name: a key of ``FUNCTIONS``.
        original: what transformers would call.
        packaged: ``original`` is of mamba_ssm, causal_conv1d or fla, made for GPUs: it keeps them, and crashes elsewhere.
    """
    ours = FUNCTIONS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        reason = why_not(x)
        if reason or (packaged and x.is_cuda):
            if reason:
                say_once(f"scans: {reason}", f"effvlm: {reason}; transformers' own functions run")
            return original(*args, **kwargs)
        return ours(*args, **kwargs)

    return call
