"""How modules of routed experts run on compressed weights: which parameters they are, and a forward in place of the module's own.

A module's parameters give way to :class:`~effvlm.hf.planes.Planes` of the same names, and its instance gets a forward that asks
these for products. The same forward runs with anything else that is called like them, which is how calibration listens in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from effvlm.hf import own_experts
from effvlm.hf.experts import is_experts
from effvlm.hf.planes import Planes

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Rows = Callable[[torch.Tensor], torch.Tensor]
_NAMES = ("Experts", "MoE", "MoeBlock", "SparseMLP", "SparseMoeBlock", "TextMoe", "MoELayer", "MoeLayer")
LEFT_ALONE = own_experts.LEFT_ALONE | {
    "VitPoseNaiveMoe": "its experts are single small layers",
    "TowerExperts": "a tower that effvlm.experts.upcycle made has no class in transformers that could load it",
}


@dataclass(frozen=True)
class Slot:
    """A stack of matrices (E, R, C), one of the products of a module of experts.

    Attributes:
        path: where its compressed form goes, below the module.
        parameters: the one that holds all experts, or one per expert.
        experts: E.
        transposed: whether the parameter holds (C, R).
    """

    path: str
    parameters: tuple[str, ...]
    experts: int
    transposed: bool = False

    def arranged(self, stored: torch.Tensor, experts: int) -> torch.Tensor:
        """The (B, R, C) matrices of ``experts`` experts, from what the parameter holds of them; a view."""
        stack = stored.unflatten(0, (experts, -1)) if stored.dim() == 2 else stored[:experts]
        return stack.mT if self.transposed else stack

    def read(self, module: Any, begin: int, end: int) -> torch.Tensor:
        """(end − begin, R, C) from the module's parameters; a view where they are one tensor."""
        if len(self.parameters) > 1:
            return torch.stack([module.get_parameter(p).detach() for p in self.parameters[begin:end]])
        return self.arranged(module.get_parameter(self.parameters[0]).detach(), self.experts)[begin:end]

    def shape(self, module: Any) -> tuple[int, int, int]:
        """(E, R, C) of a module with parameters, on any device."""
        first = module.get_parameter(self.parameters[0])
        if len(self.parameters) > 1:
            return (self.experts, *first.shape)
        E, R, C = self.arranged(first, self.experts).shape
        return E, R, C


def mix(
    x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, up: Product, between: Rows, down: Product,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None), after: Rows | None = None,
) -> torch.Tensor:  # fmt: skip
    """(T, O) in the dtype of x: the sum over a token's choices of ``weight · after(down(between(up(x))))``.

    Args:
        x: (T, H).
        ids: (T, K) int64; −1 and E choose nothing.
        weight: (T, K).
        up, down: (rows, C) and (rows, K) ids → (rows, K, R).
        between: (S, R) → (S, I), the gate.
        biases: (E, R) and (E, O), or None.
        after: (S, O) → (S, O).
    """
    for product in (up, down):
        if isinstance(product, Planes):
            product.prefetch(ids)
    flat = ids.reshape(-1, 1)
    made = between(_biased(up(x, ids).flatten(0, 1), flat, biases[0]))
    made = _biased(down(made, flat)[:, 0], flat, biases[1])
    if after is not None:
        made = after(made)
    return (made.view(*ids.shape, -1).float() * weight[..., None].float()).sum(1).to(x.dtype)


def _biased(rows: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return rows
    return rows + torch.where((ids >= 0) & (ids < len(bias)), bias[ids[:, 0].clamp(0, len(bias) - 1)], 0)


def _chunked(act: Rows) -> Rows:
    def between(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return act(gate) * up

    return between


# ---- one forward per class ----


def _registered(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    between = module._apply_gate if module.has_gate else module.act_fn
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    after = module.post_expert_norm if module.has_post_expert_norm else None
    up = getattr(module, name)
    return mix(hidden_states, top_k_index, top_k_weights, up, between, module.down_proj, biases, after)


def _llama4(module: Any, hidden_states: torch.Tensor) -> Any:
    """Scores scale the input; the original runs every token through every expert."""
    x = hidden_states.reshape(-1, module.hidden_dim)
    logits = torch.nn.functional.linear(x, module.router.weight, module.router.bias)
    best, ids = logits.topk(module.top_k, dim=1)
    scaled = (x[:, None] * best.float().sigmoid().to(x.dtype)[..., None]).flatten(0, 1)
    experts = module.experts
    ones = torch.ones(len(scaled), 1, device=x.device)
    routed = mix(scaled, ids.reshape(-1, 1), ones, experts.gate_up_proj, _chunked(experts.act_fn), experts.down_proj)
    out = module.shared_expert(x)
    return out + routed.view(len(x), module.top_k, -1).sum(1), logits


def _jetmoe(module: Any, layer_input: torch.Tensor) -> torch.Tensor:
    """Chooses as its router does, which would return the choices sorted by expert."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    best, ids = module.router.layer(x).float().topk(module.router.top_k, dim=1)
    weight = best.softmax(1).to(x.dtype)
    made = mix(x, ids, weight, module.input_linear.weight, _chunked(module.activation), module.output_linear.weight)
    return torch.add(made.view(layer_input.shape), module.bias)


def _longcat(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Ids past the routed experts are identities."""
    routed = top_k_index < module.num_routed_experts
    ids, between = torch.where(routed, top_k_index, -1), _chunked(module.act_fn)
    out = mix(hidden_states, ids, top_k_weights, module.gate_up_proj, between, module.down_proj)
    return out + hidden_states * torch.where(routed, 0, top_k_weights).sum(1, keepdim=True).to(out.dtype)


def _step3p7(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    return mix(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module._apply_gate, module.down_proj)


def _dbrx(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Gates and ups are two products of the same tokens."""
    x, mlp = hidden_states.reshape(-1, module.hidden_size), module.mlp

    def gated(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.mul(mlp.activation_fn(mlp.w1(rows, ids)), mlp.v1(rows, ids))

    out = mix(x, top_k_index, top_k_weights, gated, lambda rows: rows, mlp.w2)
    return out.view(len(hidden_states), -1, module.hidden_size)


def _switch(module: Any, hidden_states: torch.Tensor, selected: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
    """``selected``: (T, 1, E) one-hot, all zeros where the expert had no room."""
    ids = torch.where(selected.any(-1), selected.argmax(-1), -1)
    return mix(hidden_states, ids, routing_weights, module.wi, module["expert_0"].act, module.wo)


def _nllb(module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor) -> torch.Tensor:
    """Takes the 0 or 1 of each (token, expert) for an expert's id, so that only experts 0 and 1 ever compute."""
    ids = torch.arange(2, device=hidden_states.device).expand(len(hidden_states), 2)
    kept = 1 - module.moe_token_dropout
    sums = torch.stack([torch.where(router_mask == e, router_probs, 0).sum(1) for e in (0, 1)], 1).float() * kept
    parts = [module[f"expert_{e}"] for e in (0, 1)]
    biases = (torch.stack([p.fc1.bias for p in parts]), torch.stack([p.fc2.bias for p in parts]))
    return mix(hidden_states, ids, sums, module.fc1, parts[0].act, module.fc2, biases)


# ---- what is known of each class ----


def _stack(path: str, experts: int, transposed: bool = False) -> Slot:
    return Slot(path, (path,), experts, transposed)


def _registered_slots(module: Any) -> list[Slot]:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return [_stack(path, module.num_experts, module.is_transposed) for path in (name, "down_proj")]


def _list_slots(*names: str) -> Callable[[Any], list[Slot]]:
    def slots(module: Any) -> list[Slot]:
        E = module.num_experts
        return [Slot(name, tuple(f"expert_{e}.{name}.weight" for e in range(E)), E) for name in names]

    return slots


@dataclass(frozen=True)
class Kind:
    """What runs in place of a class's forward, and the slots of an instance in the order in which they compute."""

    forward: Callable[..., Any]
    slots: Callable[[Any], list[Slot]]


_REGISTERED = Kind(_registered, _registered_slots)
KINDS: dict[str, Kind] = {
    "Llama4TextMoe": Kind(
        _llama4, lambda m: [_stack(f"experts.{p}", m.num_experts, True) for p in ("gate_up_proj", "down_proj")]
    ),
    "JetMoeMoE": Kind(
        _jetmoe, lambda m: [_stack(f"{p}.weight", m.input_linear.num_experts) for p in ("input_linear", "output_linear")]
    ),
    "LongcatFlashExperts": Kind(_longcat, lambda m: [_stack(p, m.num_routed_experts) for p in ("gate_up_proj", "down_proj")]),
    "Step3p7Experts": Kind(_step3p7, lambda m: [_stack(p, m.num_experts) for p in ("gate_up_proj", "down_proj")]),
    "DbrxExperts": Kind(_dbrx, lambda m: [_stack(f"mlp.{p}", m.num_experts, p == "w2") for p in ("w1", "v1", "w2")]),
    "SwitchTransformersExperts": Kind(_switch, _list_slots("wi", "wo")),
    "NllbMoeExperts": Kind(_nllb, _list_slots("fc1", "fc2")),
}


def kind_of(module: torch.nn.Module) -> Kind | None:
    """How a module of experts runs compressed; None for other modules, and for those that cannot."""
    known = KINDS.get(type(module).__name__)
    return known if known is not None else _REGISTERED if is_experts(module) else None


def slots_of(module: torch.nn.Module) -> list[Slot]:
    """A known module's stacks, in the order in which they compute."""
    kind = kind_of(module)
    assert kind is not None, "only modules of a known kind have slots"
    return kind.slots(module)


def found(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Name → module of experts that can be compressed (or are); name → why not, of the others that look like experts."""
    modules: dict[str, Any] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in LEFT_ALONE:
            others[name] = f"{kind}: {LEFT_ALONE[kind]}"
        elif kind_of(module) is not None:
            modules[name] = module
        elif kind.endswith(_NAMES) and not _holds_known(module) and not any(name.startswith(f"{outer}.") for outer in modules):
            others[name] = f"{kind}: it computes its experts itself, in a way that we do not know"
    return modules, others


def _holds_known(module: torch.nn.Module) -> bool:
    return any(kind_of(m) is not None or type(m).__name__ in LEFT_ALONE for m in module.modules())


def is_compressed(module: torch.nn.Module) -> bool:
    """Whether a module of experts runs on compressed weights."""
    return any(isinstance(m, Planes) for m in module.modules())


def planes_of(model: torch.nn.Module) -> Iterator[tuple[str, Planes]]:
    """(name, compressed stack) of all in a model."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Planes))


class _Gone:
    """In the place of a parameter that is a part of some :class:`Planes`; transformers' initialisation passes it by."""

    _is_hf_initialized = True


def install(module: Any, products: Mapping[str, torch.nn.Module]) -> None:
    """Put products in the place of parameters, and our forward in that of the module's; parameters are let go."""
    kind = kind_of(module)
    assert kind is not None
    slots = {slot.path: slot for slot in kind.slots(module)}
    for path, product in products.items():
        for name in slots[path].parameters:
            owner, last = _owner(module, name)
            if owner._parameters.pop(last, None) is not None and name != path:
                setattr(owner, last, _Gone())
        owner, last = _owner(module, path)
        owner.add_module(last, product)
    module.forward = MethodType(kind.forward, module)


def uninstall(module: Any, dtype: torch.dtype) -> None:
    """Parameters of the same values again, and the class's own forward."""
    for slot in slots_of(module):
        owner, last = _owner(module, slot.path)
        planes = owner._modules.pop(last)
        assert isinstance(planes, Planes)
        dense = planes.dequantized(dtype)
        parts = list(dense) if len(slot.parameters) > 1 else [_stored(module, slot, dense)]
        for name, part in zip(slot.parameters, parts, strict=True):
            owner, last = _owner(module, name)
            vars(owner).pop(last, None)
            owner.register_parameter(last, torch.nn.Parameter(part, requires_grad=False))
    del module.forward


def _stored(module: Any, slot: Slot, dense: torch.Tensor) -> torch.Tensor:
    """(E, R, C) as the class's parameter has it."""
    dense = dense.mT.contiguous() if slot.transposed else dense
    if type(module).__name__ == "DbrxExperts":
        return dense.flatten(0, 1)
    extra = getattr(module, "zero_expert_num", 0) if slot.path == "gate_up_proj" else 0  # LongCat has rows for its identities
    return torch.cat([dense, dense.new_zeros(extra, *dense.shape[1:])]) if extra else dense


def _owner(module: Any, path: str) -> tuple[Any, str]:
    owner, _, last = path.rpartition(".")
    return module.get_submodule(owner), last
