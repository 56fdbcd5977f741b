"""Families that compute their experts themselves instead of asking transformers' registry: one function per class.

Each takes the place of the instance's ``forward`` and is taken away again by :func:`effvlm.disable`; routers and shared experts
stay the module's own. Nothing says that a later transformers keeps what these classes compute, so :func:`why_not` tries the first
of each class against its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from effvlm._library import FLOATS
from effvlm.hf.gates import Gate, gate_of, match_gate
from effvlm.hf.in_parts import by_id, experts_in_parts
from effvlm.hf.stacked import Stacked
from effvlm.ops.grouped_linear import grouped_linear
from effvlm.ops.moe_ffn import moe_ffn

MANY_ON_CUDA = 64  # tokens from which on torch's own GEMMs are what a GPU should run: our CUDA kernel is made for decoding

Args = tuple[torch.Tensor, ...]
_stacks: WeakKeyDictionary[torch.nn.Module, dict[str, Stacked]] = WeakKeyDictionary()


def _experts(module: Any) -> list[Any]:
    if isinstance(module, torch.nn.ModuleDict):
        return [expert for name, expert in module.items() if name.startswith("expert_")]
    return list(module)


def _pack(module: Any, *, free_original: bool = False) -> dict[str, Stacked]:
    parts = {p: [e.get_parameter(p) for e in _experts(module)] for p in FAMILIES[type(module).__name__].stacked}
    _stacks[module] = {p: Stacked(each, free_original=free_original) for p, each in parts.items()}
    return _stacks[module]


def _stack(module: Any, name: str) -> torch.Tensor:
    """(E, …): parameter ``name`` of every expert."""
    stacks = _stacks.get(module) or _pack(module)  # a copy of a module is another module
    return stacks[name].tensor()


# ---- one forward per class ----


def _llama4(module: Any, hidden_states: torch.Tensor) -> Any:
    """Sends each token to its experts only (the original: every token through every expert). Scores scale the input."""
    x = hidden_states.reshape(-1, module.hidden_dim)
    logits = torch.nn.functional.linear(x, module.router.weight, module.router.bias)
    best, ids = logits.topk(module.top_k, dim=1)  # the router's own forward goes on to scores of all experts, mostly zeros
    scaled = (x[:, None] * best.float().sigmoid().to(x.dtype)[..., None]).flatten(0, 1)
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


def _longcat(module: Any, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Ids past the routed experts are identities."""
    routed = ids < module.num_routed_experts
    up = module.gate_up_proj[: module.num_routed_experts]
    out = moe_ffn(x, torch.where(routed, ids, -1), weight.float(), up, module.down_proj, **vars(_gate(module)))
    return out + x * torch.where(routed, 0, weight).sum(1, keepdim=True).to(out.dtype)


def _step3p7(module: Any, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Its clamp comes after the activation, which is fused where there is none."""
    found = gate_of(module, _find_gate)
    if found is not None:
        return moe_ffn(x, ids, weight.float(), module.gate_up_proj, module.down_proj, **vars(found))
    return experts_in_parts(x, ids, weight, by_id(ids, module.gate_up_proj), module._apply_gate, by_id(ids, module.down_proj))


def _dbrx(module: Any, hidden_states: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gates and ups are two parameters, so that no one tensor has both; down is stored transposed."""
    x, mlp = hidden_states.reshape(-1, module.hidden_size), module.mlp
    w1, v1, w2 = (p.unflatten(0, (module.num_experts, -1)) for p in (mlp.w1, mlp.v1, mlp.w2))
    gate, up = by_id(ids, w1), by_id(ids, v1)
    out = experts_in_parts(
        x, ids, weight, lambda rows: mlp.activation_fn(gate(rows)) * up(rows), lambda rows: rows, by_id(ids, w2.mT)
    )
    return out.view(len(hidden_states), -1, module.hidden_size)


def _switch(module: Any, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``chosen``: (T, 1, E) one-hot, all zeros where the expert had no room."""
    ids = torch.where(chosen.any(-1), chosen.argmax(-1), -1)
    up, down = _stack(module, "wi.weight"), _stack(module, "wo.weight")
    return moe_ffn(x.to(up.dtype), ids, weight.float(), up, down, **vars(_gate(module))).to(x.dtype)


def _nllb(module: Any, x: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Takes the 0 or 1 of each (token, expert) in ``mask`` for an expert's id, so that only experts 0 and 1 ever compute."""
    ids = torch.arange(2, device=x.device).expand(len(x), 2)
    kept = 1 - module.moe_token_dropout
    sums = torch.stack([torch.where(mask == e, weight, 0).sum(1) for e in (0, 1)], 1).float() * kept
    names = ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")
    up, down, up_bias, down_bias = (_stack(module, name) for name in names)
    return moe_ffn(x, ids, sums, up, down, up_bias=up_bias, down_bias=down_bias, **vars(_gate(module)))


def _vitpose(module: Any, hidden_state: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """One expert per image, by data set (the original: every expert on every image, and a mask)."""
    ids = indices.reshape(-1, 1).expand(hidden_state.shape[:2]).reshape(-1).long()
    weight, bias = _stack(module, "weight"), _stack(module, "bias")
    ids = torch.where((ids >= 0) & (ids < len(weight)), ids, -1)
    return grouped_linear(hidden_state.flatten(0, 1), ids, weight, bias=bias).view(*hidden_state.shape[:2], weight.shape[1])


# ---- what is known of each class ----


def _weights(*shape: int) -> torch.Tensor:
    return torch.linspace(0.2, 0.9, torch.Size(shape).numel()).view(shape)


def _routed(module: Any, x: torch.Tensor, ids: torch.Tensor) -> Args:
    return x, ids, _weights(*ids.shape).to(x)


def _one_hot(module: Any, x: torch.Tensor, ids: torch.Tensor) -> Args:
    return x, torch.nn.functional.one_hot(ids[:, :1], module.num_experts), _weights(len(x), 1).to(x)


def _masked(module: Any, x: torch.Tensor, ids: torch.Tensor) -> Args:
    return x, torch.nn.functional.one_hot(ids[:, 0], module.num_experts), _weights(len(x), module.num_experts).to(x)


@dataclass(frozen=True)
class Family:
    """A class of experts.

    Attributes:
        forward: what takes the place of the class's own.
        width: of the input.
        probe: (module, (3, H) rows, (3, 2) ids) → arguments of a call.
        stacked: parameters of each expert that are packed into one tensor.
        gate: ``"needed"`` by its forward, ``"tried"``, or ``"none"``.
    """

    forward: Callable[..., Any]
    width: Callable[[Any], int]
    probe: Callable[[Any, torch.Tensor, torch.Tensor], Args] = _routed
    stacked: tuple[str, ...] = ()
    gate: str = "needed"


def _block(module: Any, x: torch.Tensor, ids: torch.Tensor) -> Args:
    return (x[None],)


FAMILIES: dict[str, Family] = {
    "Llama4TextMoe": Family(_llama4, lambda m: m.hidden_dim, _block),
    "JetMoeMoE": Family(_jetmoe, lambda m: m.input_size, _block),
    "LongcatFlashExperts": Family(_longcat, lambda m: m.gate_up_proj.shape[2]),
    "Step3p7Experts": Family(_step3p7, lambda m: m.hidden_dim, gate="tried"),
    "DbrxExperts": Family(_dbrx, lambda m: m.hidden_size, gate="none"),
    "SwitchTransformersExperts": Family(_switch, lambda m: m["expert_0"].wi.in_features, _one_hot, ("wi.weight", "wo.weight")),
    "NllbMoeExperts": Family(
        _nllb, lambda m: m["expert_0"].fc1.in_features, _masked, ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")
    ),
    "VitPoseNaiveMoe": Family(
        _vitpose, lambda m: m[0].in_features, lambda m, x, ids: (x[:, None], ids[:, :1, None]), ("weight", "bias"), "none"
    ),
}
LEFT_ALONE = {"DogeCDMoE": "its experts are single neurons, looked up like embeddings: no product to make faster"}


def _find_gate(module: Any) -> Gate | None:
    if isinstance(module, torch.nn.ModuleDict):
        return match_gate(_experts(module)[0].act, gated=False)
    holder = module.experts if type(module).__name__ == "Llama4TextMoe" else module
    if hasattr(holder, "_apply_gate"):
        return match_gate(holder._apply_gate, gated=True)
    act = holder.activation if hasattr(holder, "activation") else holder.act_fn
    return match_gate(lambda rows: act(rows.chunk(2, dim=-1)[0]) * rows.chunk(2, dim=-1)[1], gated=True)


def _gate(module: Any) -> Gate:
    found = gate_of(module, _find_gate)
    assert found is not None, "only modules whose gate is known are replaced"
    return found


# ---- replacing, and when not ----


def _agrees(module: torch.nn.Module, family: Family) -> bool:
    """Whether ours computes what the class's own forward does, on three tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, family.width(module), generator=generator).to(next(module.parameters()))
    args = family.probe(module, x, torch.tensor([[0, 1], [1, 0], [0, 1]], device=x.device))
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    with torch.no_grad():
        own, ours = (f(module, *args) for f in (type(module).forward, family.forward))
    for part, training in modes:
        part.training = training
    own, ours = (t[0] if isinstance(t, tuple) else t for t in (own, ours))
    limit = 8 * torch.finfo(x.dtype).eps ** 0.75 * max(float(own.abs().max()), 1e-3)  # far below a wrong gate or expert
    return own.shape == ours.shape and bool(((own - ours).abs() <= limit).all())


def odd_weight(weights: Iterable[torch.Tensor]) -> str:
    """What about a module's weights our kernels cannot read; empty when they can."""
    for weight in weights:
        if weight.dtype not in FLOATS or type(weight) not in (torch.Tensor, torch.nn.Parameter):
            return f"weights are {str(weight.dtype).removeprefix('torch.')} {type(weight).__name__}"
        if weight.device.type not in ("cpu", "cuda"):
            return f"weights are on {weight.device} (offloaded?)"
    return ""


def why_not(module: torch.nn.Module, tried: dict[str, bool]) -> str:
    """Why a module of one of these classes cannot be replaced; empty when it can.

    Args:
        module: an instance.
        tried: class name → whether ours agrees; filled here, so that one of each class is tried.
    """
    name, family = type(module).__name__, FAMILIES[type(module).__name__]
    reason = odd_weight(module.parameters())
    if not reason and family.gate != "none" and gate_of(module, _find_gate, again=True) is None and family.gate == "needed":
        reason = "its gate is none that is fused"
    if not reason:
        if name not in tried:
            tried[name] = _agrees(module, family)
        reason = "" if tried[name] else "it computes something else than in the version that ours was written for"
    return reason and f"{reason}; its own forward runs"


def prepare(module: torch.nn.Module, *, free_original: bool) -> str:
    """What runs in place of a module's forward, in words; packs its weights if they are to be freed."""
    extra = sum(s.bytes for s in _pack(module, free_original=free_original).values())
    words = f"effvlm's kernels in place of {type(module).__name__}.forward"
    return words + (f", with a packed copy of {extra / 2**20:.1f} MiB that free_original=True saves" if extra else "")


def forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the instance's ``forward`` becomes: our kernel, or the class's own for a backward and for many tokens on a GPU."""
    trained = module.training or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
    if trained or (x.is_cuda and x.numel() // x.shape[-1] > MANY_ON_CUDA):
        return type(module).forward(module, x, *args, **kwargs)
    return FAMILIES[type(module).__name__].forward(module, x, *args, **kwargs)
