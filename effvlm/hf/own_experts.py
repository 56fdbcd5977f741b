"""Families that compute their experts themselves instead of asking transformers' registry: one function per class.

Each takes the place of the instance's ``forward`` and is taken away again by :func:`effvlm.disable`; routers and shared experts
stay the module's own. What a family stores in a form that :func:`effvlm.moe_ffn` cannot read in place is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effvlm.hf.gates import Gate, gate_of, match_gate
from effvlm.ops.moe_ffn import moe_ffn

MANY_ON_CUDA = 64  # tokens from which on torch's own GEMMs are what a GPU should run: our CUDA kernel is made for decoding


def _llama4(module: Any, hidden_states: torch.Tensor) -> Any:
    """Sends each token to its experts only (the original: every token through every expert). Scores scale the input."""
    x = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(x)
    score, ids = scores.topk(module.top_k, dim=1)  # the scores of all other experts are zero
    scaled = (x[:, None] * score[..., None]).flatten(0, 1)
    ones = torch.ones(len(scaled), 1, device=x.device)
    up, down = module.experts.gate_up_proj.mT, module.experts.down_proj.mT
    routed = moe_ffn(scaled, ids.reshape(-1, 1), ones, up, down, **vars(_gate(module)))
    out = module.shared_expert(x)
    return out + routed.view(len(x), module.top_k, -1).sum(1), logits


def _jetmoe(module: Any, layer_input: torch.Tensor) -> Any:
    """The router returns choices sorted by expert; each is a token of its own here."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    _, token, weight, sizes, _ = module.router(x)
    experts = torch.arange(len(sizes), device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
    found = vars(_gate(module))
    up, down = module.input_linear.weight, module.output_linear.weight
    made = moe_ffn(x[token], experts[:, None], weight[:, None].float(), up, down, **found)
    return torch.zeros_like(x).index_add(0, token, made).view(layer_input.shape) + module.bias


def _longcat(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Ids past the routed experts are identities."""
    routed = top_k_index < module.num_routed_experts
    ids, up = torch.where(routed, top_k_index, -1), module.gate_up_proj[: module.num_routed_experts]
    out = moe_ffn(hidden_states, ids, top_k_weights.float(), up, module.down_proj, **vars(_gate(module)))
    return out + hidden_states * torch.where(routed, 0, top_k_weights).sum(1, keepdim=True).to(out.dtype)


def _step3p7(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    weights = top_k_weights.float()
    return moe_ffn(hidden_states, top_k_index, weights, module.gate_up_proj, module.down_proj, **vars(_gate(module)))


FORWARDS: dict[str, Callable[..., Any]] = {
    "Llama4TextMoe": _llama4,
    "JetMoeMoE": _jetmoe,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": _step3p7,
}


def _experts_of(module: Any) -> Any:
    return module.experts if type(module).__name__ == "Llama4TextMoe" else module


def _find_gate(module: Any) -> Gate | None:
    holder = _experts_of(module)
    if hasattr(holder, "_apply_gate"):
        return match_gate(holder._apply_gate, gated=True)
    act = holder.activation if hasattr(holder, "activation") else holder.act_fn
    return match_gate(lambda rows: act(rows.chunk(2, dim=-1)[0]) * rows.chunk(2, dim=-1)[1], gated=True)


def _gate(module: Any) -> Gate:
    found = gate_of(module, _find_gate)
    assert found is not None, "only modules whose gate is known are replaced"
    return found


def why_not(module: torch.nn.Module) -> str:
    """Why a module of one of these classes cannot be replaced; empty when it can."""
    return "" if gate_of(module, _find_gate, again=True) else "its gate is none that is fused; its own forward runs"


def forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the instance's ``forward`` becomes: our kernel, or the class's own for a backward and for many tokens on a GPU."""
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    if trained or (x.is_cuda and x.numel() // x.shape[-1] > MANY_ON_CUDA):
        return type(module).forward(module, x, *args, **kwargs)
    return FORWARDS[type(module).__name__](module, x, *args, **kwargs)
