"""Find a model's routed experts, and everything in it that depends on how many there are.

No list of families: a model's own class is built twice from its config, without memory (on the ``meta`` device), with as many
experts as it has and with as many as it shall have. Tensors and numbers that differ between the two are what has to change, and
the second is what ``from_pretrained`` will build from the saved config. So whatever a family keeps per expert (rows of the
router, biases that correct its choice, scales) is found, and what is not one row per expert is refused by name before anything
changes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from effvlm._library import FLOATS
from effvlm.experts.tower import TowerExperts
from effvlm.hf.experts import is_experts

_COUNT = re.compile(r"(num|n|moe_num)_(local_|routed_)?experts")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


def routed(model: Any, method: str) -> dict[str, Any]:
    """Name → module of every layer's routed experts: those of transformers' registry, and those :func:`upcycle` puts into towers.

    Raises:
        TypeError: not a ``torch.nn.Module``.
        ValueError: it has no such experts.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{method}: expected a model, got {type(model).__name__}")
    found = {name: m for name, m in model.named_modules() if is_experts(m) or isinstance(m, TowerExperts)}
    if not found:
        raise ValueError(
            f"{method}: expected a model with routed experts in transformers' registry (use_experts_implementation), "
            f"got {type(model).__name__} without any"
        )
    return found


def fused(experts: Any) -> list[str]:
    """Names of a module's tensors that hold all experts along dimension 0: up, down and their biases."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if experts.has_bias else [])


@dataclass(frozen=True)
class Layer:
    """One layer's experts and what routes to them.

    Attributes:
        name: of the module of experts.
        experts: the module.
        block: the module around it, with the router.
        count: number of experts.
        wanted: number of experts it shall have.
        dims: full name of each tensor with an expert dimension → that dimension.
    """

    name: str
    experts: Any
    block: torch.nn.Module
    count: int
    wanted: int
    dims: dict[str, int]

    def is_routers(self, tensor: str) -> bool:
        """Whether a tensor belongs to what routes, not to the experts."""
        return not tensor.startswith(f"{self.name}.")

    def _routing(self, name: str) -> Any:
        own = set(self.experts.modules())
        values = [getattr(m, name) for m in self.block.modules() if m not in own and hasattr(m, name)]
        return next((v for v in values if isinstance(v, int)), None)

    @property
    def top_k(self) -> int:
        """How many experts a token gets."""
        names = [n for n in _TOP_K if isinstance(getattr(self.experts.config, n, None), int)]
        known = self._routing("top_k") or (getattr(self.experts.config, names[0]) if names else None)
        if known is None:
            raise ValueError(
                f"{self.name}: expected a router with top_k, or a config with one of {', '.join(_TOP_K)}; got neither"
            )
        return int(known)

    @property
    def groups(self) -> int:
        """Into how many groups of neighbours the router splits the experts; 1 for no groups."""
        return self._routing("num_group") or 1

    @property
    def chosen_groups(self) -> int:
        """How many of the groups a token may choose from."""
        return self._routing("topk_group") or 1 if self.groups > 1 else 1


def describe(model: Any, name: str, wanted: int) -> Layer:
    """The layer of one module of experts, with no dimensions known yet."""
    experts = model.get_submodule(name)
    return Layer(name, experts, model.get_submodule(name.rpartition(".")[0]), experts.num_experts, wanted, {})


@dataclass(frozen=True)
class Resizing:
    """All that changes in a model with its number of experts; nothing has changed yet."""

    model: Any
    layers: dict[str, Layer]
    configs: list[tuple[Any, str, int]]
    numbers: list[tuple[torch.nn.Module, str, int]]

    @torch.no_grad()
    def apply(self, change: Callable[[Layer, str, torch.Tensor, int], torch.Tensor]) -> None:
        """Replace every tensor by ``change(layer, name, tensor, expert dimension)``, then the numbers of modules and configs."""
        for layer in self.layers.values():
            for name, dim in layer.dims.items():
                owner, _, last = name.rpartition(".")
                module = self.model.get_submodule(owner)
                old = getattr(module, last)
                new = change(layer, name, old.detach(), dim).contiguous()
                if isinstance(old, torch.nn.Parameter):
                    module._parameters[last] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                else:
                    module._buffers[last] = new
        for target, name, value in (*self.numbers, *self.configs):
            setattr(target, name, value)


def _configs(*roots: Any) -> Iterator[Any]:
    """Every config in the trees below some configs and modules, once."""
    from transformers import PreTrainedConfig

    seen: set[int] = set()
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, PreTrainedConfig):
            yield item
        stack += [v for v in vars(item).values() if isinstance(v, PreTrainedConfig)]


def _settings(roots: list[Any], method: str, layers: dict[str, Any], wanted: dict[str, int]) -> list[tuple[Any, str, int]]:
    """(config, name, number of experts it shall have), after checking that layers of one config agree."""
    asked: dict[tuple[type, int], int] = {}
    for name, module in layers.items():
        config = getattr(module, "config", None)
        if config is None:
            raise ValueError(
                f"{method}: expected experts that a config made, got {name}, which effvlm.experts.upcycle put into a tower: "
                "its class has no number of experts to change"
            )
        kind = (type(config), module.num_experts)
        if asked.setdefault(kind, wanted[name]) != wanted[name]:
            raise ValueError(
                f"{method}: expected the same number of experts in every layer, since {type(config).__name__} has one number for "
                f"all, got {asked[kind]} and {wanted[name]} ({name})"
            )
    found = [
        (config, field, asked[type(config), value])
        for config in _configs(*roots)
        for field, value in vars(config).items()
        if _COUNT.fullmatch(field) and type(value) is int and (type(config), value) in asked
    ]
    for config_class, count in asked:
        if not any(type(config) is config_class for config, _, _ in found):
            raise ValueError(f"{method}: expected one number of experts in {config_class.__name__}, got none that is {count}")
    return found


def _twin(model: Any, method: str, settings: Callable[[list[Any]], list[tuple[Any, str, int]]]) -> Any:
    """The model's class built from its config as ``settings`` change it, without memory."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    for target, name, value in settings([config]):
        setattr(target, name, value)
    try:
        config = type(config).from_dict(config.to_dict())  # runs what from_pretrained will check
        with torch.device("meta"), no_init_weights():
            return type(model)(config)
    except Exception as error:  # the family's own code: whatever it raises, the saved model would raise when loaded
        raise ValueError(f"{method}: {type(model).__name__} cannot be built with that many experts: {error}") from error


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def resize(model: Any, method: str, wanted: dict[str, int]) -> Resizing:
    """What has to change for every layer of experts to have ``wanted[name]`` of them.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: no routed experts; layers that share a config want different numbers; the class cannot be built with that
            many; or something depends on the number in a way that is not one row per expert.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{method}: expected a Hugging Face model (PreTrainedModel), got {type(model).__name__}")
    modules = routed(model, method)
    roots = [model.config, *model.modules()]
    configs = _settings(roots, method, modules, wanted)
    now = _twin(model, method, lambda _: [])
    then = _twin(model, method, lambda root: _settings(root, method, modules, wanted))
    if [n for n, _ in now.named_modules()] != [n for n, _ in then.named_modules()]:
        raise ValueError(f"{method}: {type(model).__name__} with that many experts is built of other modules; keep more of them")
    layers = {name: describe(model, name, wanted[name]) for name in modules}
    _assign(model, method, _tensors(now), _tensors(then), layers)
    return Resizing(model, layers, configs, _numbers(model, method, now, then))


def _assign(model: Any, method: str, now: dict[str, Any], then: dict[str, Any], layers: dict[str, Layer]) -> None:
    """Give every tensor whose shape depends on the number of experts to its layer."""
    held, owners = _tensors(model), {name.rpartition(".")[0]: layer for name, layer in layers.items()}
    shared: set[int] = set()
    for name in (n for n in now if now[n].shape != then[n].shape):
        block = next((b for b in sorted(owners, key=len, reverse=True) if name.startswith(f"{b}." if b else "")), None)
        if block is None:
            raise ValueError(f"{method}: {name} depends on the number of experts, but is in no layer of experts that we know")
        layer, tensor = owners[block], held.get(name)
        _check(method, name, tensor, now[name].shape)
        assert tensor is not None
        if id(tensor) in shared:
            raise ValueError(f"{method}: {name} is shared between layers; expected every layer to have its own")
        shared.add(id(tensor))
        pairs = [(d, a, b) for d, (a, b) in enumerate(zip(now[name].shape, then[name].shape, strict=True)) if a != b]
        if [(a, b) for _, a, b in pairs] != [(layer.count, layer.wanted)]:
            raise ValueError(
                f"{method}: expected one row of {name} per expert ({layer.count}), got shape {tuple(tensor.shape)}, "
                f"which would be {tuple(then[name].shape)} with {layer.wanted}"
            )
        layer.dims[name] = pairs[0][0]
    for layer in layers.values():
        _check_layer(method, layer)


def _check(method: str, name: str, tensor: torch.Tensor | None, shape: torch.Size) -> None:
    if tensor is None or tensor.shape != shape:
        came = "none" if tensor is None else str(tuple(tensor.shape))
        raise ValueError(f"{method}: expected {name} of shape {tuple(shape)}, as its config makes it, got {came}")
    if tensor.dtype not in FLOATS or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        where = f"{str(tensor.dtype).removeprefix('torch.')} {type(tensor).__name__} on {tensor.device}"
        raise ValueError(f"{method}: expected {name} in float32, float16 or bfloat16 on a device (not quantised), got {where}")


def _check_layer(method: str, layer: Layer) -> None:
    if layer.wanted == layer.count:
        return
    missing = [n for n in fused(layer.experts) if layer.dims.get(f"{layer.name}.{n}") != 0]
    if missing or not any(map(layer.is_routers, layer.dims)):
        raise ValueError(
            f"{method}: changing the number of experts in {type(layer.experts.config).__name__} does not change "
            f"{layer.name}.{missing[0] if missing else '*, or not its router'}"
        )
    own = {id(b) for b in layer.experts.buffers()}
    for name, buffer in layer.block.named_buffers():
        if not buffer.is_floating_point() and id(buffer) not in own:
            raise ValueError(f"{method}: {layer.name}: {name} beside the experts holds integers; ids of experts would be wrong")


def _numbers(model: Any, method: str, now: Any, then: Any) -> list[tuple[torch.nn.Module, str, int]]:
    """Integers that the classes' constructors derive from the number of experts, with the values they shall have."""
    found = []
    for (name, before), after in zip(now.named_modules(), then.modules(), strict=True):
        for key, value in vars(before).items():
            if type(value) is int and value != vars(after)[key]:
                module = model.get_submodule(name)
                if vars(module).get(key) != value:
                    raise ValueError(f"{method}: expected {name}.{key} == {value}, got {vars(module).get(key)}")
                found.append((module, key, vars(after)[key]))
    return found


def check_routing(method: str, layer: Layer) -> None:
    """Raise unless the layer's router can route to ``layer.wanted`` experts."""
    per, groups = layer.wanted // layer.groups, layer.groups
    if layer.top_k > layer.wanted:
        raise ValueError(f"{method}: expected at least top-k = {layer.top_k} experts in {layer.name}, got {layer.wanted}")
    if groups == 1:
        return
    if layer.wanted % groups or per < 2:  # the routers score a group by its two best
        raise ValueError(
            f"{method}: expected a multiple of the {groups} groups that the router of {layer.name} chooses from, with two or "
            f"more experts each, got {layer.wanted} experts"
        )
    if per * layer.chosen_groups < layer.top_k:
        raise ValueError(
            f"{method}: expected top-k = {layer.top_k} experts in the {layer.chosen_groups} groups that a token gets in "
            f"{layer.name}, got {per} experts each"
        )
