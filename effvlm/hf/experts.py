"""Routed experts of a Hugging Face model through :func:`effvlm.moe_ffn`, by transformers' own registry.

transformers asks ``config._experts_implementation`` on every call for the function that computes a module's experts; we register
one under ``"effvlm"`` and select it. Families that do not ask get a forward per instance (:mod:`effvlm.hf.own_experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effvlm._library import say_once
from effvlm.hf import own_experts
from effvlm.hf.enable_report import EnableReport
from effvlm.hf.gates import Gate, gate_of, match_gate
from effvlm.hf.in_parts import by_id, experts_in_parts
from effvlm.hf.instances import REPLACED, replace_forward
from effvlm.ops.moe_ffn import moe_ffn

KEY = "effvlm"
_UNDECORATED = ("Experts", "MoE", "MoeBlock", "SparseMLP", "SparseMoeBlock", "TextMoe", "MoELayer", "MoeLayer")


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module's class carries transformers' ``use_experts_implementation``."""
    return all(hasattr(module, name) for name in ("_is_expert_parallel", "is_transposed", "has_gate", "_apply_gate"))


def weights_of(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, R, H) and (E, O, I) as views, however the module stores them."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return (up.mT, module.down_proj.mT) if module.is_transposed else (up, module.down_proj)


def _biases(module: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not module.has_bias:
        return None, None
    return (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias), module.down_proj_bias


def find_gate(module: Any) -> Gate | None:
    """The module's gate, if it is one that is fused; its attributes are hints of clamps and the like."""

    def known(*names: str) -> list[float]:
        values = [getattr(module, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, (int, float)) and v > 0]

    apply = module._apply_gate if module.has_gate else module.act_fn
    return match_gate(apply, gated=module.has_gate, limits=known("limit", "swiglu_limit"), alphas=known("alpha", "swiglu_alpha"))


def why_not(module: Any) -> str:
    """Why a module's experts cannot run on our kernels; empty when they can."""
    reason = own_experts.odd_weight(weights_of(module))
    return reason and f"{reason}; transformers' grouped_mm runs"


def experts_forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
    """What transformers calls: (T, H) states, (T, K) int64 experts and their weights → (T, H)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    up, down = weights_of(module)
    tensors = (hidden_states, top_k_weights, up, down)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    crowd = hidden_states.is_cuda and len(hidden_states) > own_experts.MANY_ON_CUDA
    reason = why_not(module)
    if reason or trained or crowd:
        if reason or trained:
            say_once(f"experts: {reason}", f"effvlm: {reason or 'training runs transformers grouped_mm, which has a backward'}")
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
    found = _fused_gate(module)
    up_bias, down_bias = _biases(module)
    x, weights = hidden_states.to(up.dtype), top_k_weights.float()
    if found is not None:
        out = moe_ffn(x, top_k_index, weights, up, down, up_bias=up_bias, down_bias=down_bias, **vars(found))
    else:
        between, after = module._apply_gate if module.has_gate else module.act_fn, None
        if module.has_post_expert_norm:
            after = module.post_expert_norm
        first, second = by_id(top_k_index, up, up_bias), by_id(top_k_index, down, down_bias)
        out = experts_in_parts(x, top_k_index, weights, first, between, second, after)
    return out.to(hidden_states.dtype)


def _fused_gate(module: Any, *, again: bool = False) -> Gate | None:
    """The gate with which all of an expert is one call of :func:`effvlm.moe_ffn`; None where something else comes between."""
    return None if module.has_post_expert_norm else gate_of(module, find_gate, again=again)


def consider(
    name: str, module: Any, report: EnableReport, undo: list[Callable[[], None]], tried: dict[str, bool], free_original: bool
) -> None:
    """Put one module's experts on our kernels, if it has any: said in ``report``, undone by ``undo``."""
    if is_experts(module):
        _select(name, module, report, undo)
    elif type(module).__name__ in own_experts.FAMILIES:
        _replace(name, module, report, undo, tried, free_original)
    elif type(module).__name__.endswith(_UNDECORATED) and not any(map(_is_known, module.modules())):
        kind = type(module).__name__
        known = own_experts.LEFT_ALONE.get(kind, "it computes its experts itself, not through transformers' registry")
        report.fallbacks[name] = f"{kind}: {known}"


def _is_known(module: torch.nn.Module) -> bool:
    return is_experts(module) or type(module).__name__ in own_experts.FAMILIES


def _select(name: str, module: Any, report: EnableReport, undo: list[Callable[[], None]]) -> None:
    reason = why_not(module)
    if reason:
        report.fallbacks[name] = reason
    else:
        found = _fused_gate(module, again=True)
        between = "gate and norm" if module.has_post_expert_norm else "gate"
        report.modules[name] = f"moe_ffn, {found}" if found else f"grouped_linear twice, with the module's own {between}"
    config, before = module.config, module.config._experts_implementation
    if before != KEY:
        config._experts_implementation_internal = KEY  # what set_experts_implementation sets, at any depth of sub-configs
        undo.append(lambda: setattr(config, "_experts_implementation_internal", before))


def _replace(
    name: str, module: Any, report: EnableReport, undo: list[Callable[[], None]], tried: dict[str, bool], free_original: bool
) -> None:
    reason = own_experts.why_not(module, tried)
    if reason:
        report.fallbacks[name] = reason
        return
    back = replace_forward(module, own_experts.forward)
    if back is None:
        report.fallbacks[name] = REPLACED.format(type(module).__name__)
        return
    report.modules[name] = own_experts.prepare(module, free_original=free_original)
    undo.append(back)
