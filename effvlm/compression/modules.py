"""One module of experts in memory to compressed weights, with what it sees of calibration data or without."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from math import ceil
from typing import Any

import torch

from effvlm.compression.calibrate import Call
from effvlm.compression.report import LayerReport
from effvlm.compression.stacks import Grams, Read, Stats, batch_of, compress_stack, in_memory
from effvlm.hf import ternary_experts
from effvlm.hf.planes import Planes
from effvlm.quant import Gram, TernaryRecipe, allocate, probe

COMPARED_TOKENS = 4096  # that the output error is measured on


class _HeardError(Exception):
    """A product's input has been seen."""


class _Ear(torch.nn.Module):
    """Takes a product's place, keeps its input and ends the call."""

    heard: tuple[torch.Tensor, torch.Tensor]

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self.heard = (x, ids)
        raise _HeardError


class _Some(torch.nn.Module):
    """A product for some of the experts; zeros for the others."""

    def __init__(self, planes: Planes, begin: int, end: int) -> None:
        super().__init__()
        self.planes, self.begin, self.end = planes, begin, end

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.planes(x, torch.where((ids >= self.begin) & (ids < self.end), ids, -1))
        return made


def shadow(module: Any) -> Any:
    """A copy of a module that shares its tensors, without hooks: what is put into it does not show in the module."""
    made = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._modules = {name: None if child is None else shadow(child) for name, child in module._modules.items()}
    made._forward_pre_hooks, made._forward_hooks = OrderedDict(), OrderedDict()
    vars(made).pop("forward", None)
    return made


@dataclass
class Inputs:
    """What one module's products see.

    Args:
        module: with its own parameters.
        calls: of the module.
        recipe: says how many tokens of an expert are looked at.
    """

    module: Any
    calls: list[Call]
    recipe: TernaryRecipe

    def grams(self, C: int, done: dict[str, Planes]) -> Grams:
        """A function for :func:`compress_stack`: Hessians of some experts' inputs to the first product that is not ``done``."""
        limit, done = ceil(self.recipe.max_tokens_factor * float(self.counts.double().mean())), dict(done)
        device = next(iter(self.module.parameters())).device

        def grams(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            found = Gram(end - begin, C, device=device)
            found.limit = limit
            for x, ids in self._heard(done, begin, end):
                for e in range(begin, end):
                    found.add(e - begin, x[(ids == e).any(1)])
            return found.sums, found.tokens

        return grams

    @cached_property
    def counts(self) -> torch.Tensor:
        """(E,) int64, how many tokens that count chose each expert."""
        E = ternary_experts.slots_of(self.module)[0].experts
        heard = (ids[(ids >= 0) & (ids < E)].cpu() for _, ids in self._heard({}, 0, E))
        return torch.stack([ids.bincount(minlength=E) for ids in heard]).sum(0)

    def weights(self) -> torch.Tensor:
        """(E,) float64, the sum of each expert's routing weights; how often it was chosen, where the module routes itself."""
        kind, E = ternary_experts.kind_of(self.module), len(self.counts)
        assert kind is not None
        total = torch.zeros(E, dtype=torch.float64)
        for call in self.calls:
            given = signature(kind.forward).bind(self.module, *call.args, **call.kwargs).arguments
            if "top_k_weights" not in given:
                return self.counts.double()
            ids, weights = given["top_k_index"].cpu(), given["top_k_weights"].double().cpu()
            counts = call.counts(len(ids))[:, None] & (ids >= 0) & (ids < E)
            total += ids[counts].bincount(weights[counts], minlength=E)
        return total

    def bits(self, read: Read, batch: int, grams: Grams) -> torch.Tensor:
        """(E,) float64, the recipe's bits shared out among a stack's matrices."""
        E = len(self.counts)
        errors = []
        for begin in range(0, E, batch):
            hessian, tokens = grams(begin, min(begin + batch, E))
            errors.append(probe(read(begin, min(begin + batch, E)), hessian, self.recipe, tokens).cpu())
        return allocate(torch.cat(errors), self.weights(), self.recipe.target_bits)

    def _heard(self, done: dict[str, Planes], begin: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows, C) inputs that count and their (rows, K) ids, call by call; right for experts ``begin`` … ``end``."""
        ear, own = _Ear(), shadow(self.module)
        products: dict[str, torch.nn.Module] = {slot.path: ear for slot in ternary_experts.slots_of(self.module)}
        ternary_experts.install(own, products | {path: _Some(planes, begin, end) for path, planes in done.items()})
        for call in self.calls:
            try:
                own.forward(*call.args, **call.kwargs)
            except _HeardError:
                x, ids = ear.heard
                counts = call.counts(len(x))
                yield x[counts], ids[counts]

    def output_error(self, done: dict[str, Planes]) -> float | None:
        """‖y − y'‖ / ‖y‖ of the module's output on the first tokens; None if it is not a number."""
        own, seen, lost, energy = shadow(self.module), 0, 0.0, 0.0
        ternary_experts.install(own, done)
        for call in self.calls:
            dense, ours = (m.forward(*call.args, **call.kwargs) for m in (shadow(self.module), own))
            dense, ours = (t[0] if isinstance(t, tuple) else t for t in (dense, ours))
            flat = dense.reshape(-1, dense.shape[-1]).double()
            counts = call.counts(len(flat))
            lost += float((ours.reshape(flat.shape).double() - flat)[counts].square().sum())
            energy += float(flat[counts].square().sum())
            seen += int(counts.sum())
            if seen >= COMPARED_TOKENS:
                break
        return (lost / energy) ** 0.5 if energy > 0 else None


@torch.no_grad()
def compress_module(
    name: str,
    module: Any,
    recipe: TernaryRecipe,
    activations: str,
    max_memory: int,
    calls: list[Call] | None,
    done: Callable[[int], None],
) -> tuple[dict[str, Planes], LayerReport]:
    """A module's stacks, one after the other, each behind those before it; the module stays as it is.

    Args:
        name: of the module, for the report.
        module: of a known kind, with parameters.
        recipe: how.
        activations: of the products.
        max_memory: bytes that weights under way may take.
        calls: of the module, by calibration data; None for none.
        done: called with the bytes of the parameters that a batch was of.
    """
    inputs = Inputs(module, calls, recipe) if calls is not None else None
    made: dict[str, Planes] = {}
    every: list[Stats] = []
    before = weights = 0
    for slot in ternary_experts.slots_of(module):
        E, R, C = slot.shape(module)
        own = module.get_parameter(slot.parameters[0])
        batch = batch_of((E, R, C), recipe, max_memory, calls is not None)
        words: list[torch.Tensor] = []
        read, count = partial(slot.read, module), _in_bytes(done, own)
        grams = inputs.grams(C, made) if inputs else None
        shares = recipe.allocate and recipe.method == "gptq" and recipe.levels != 5  # which matrices with few bits do not suit
        bits = inputs.bits(read, batch, grams) if inputs and grams and shares else None
        tensors, _, stats = compress_stack(
            f"{name}.{slot.path}", read, (E, R, C), recipe, batch, words.append, grams=grams, bits=bits, done=count
        )
        made[slot.path] = Planes(in_memory(tensors, words), activations).to(own.device)
        every.append(stats)
        before, weights = before + E * R * C * own.element_size(), weights + E * R * C
    after = sum(planes.weight.nbytes for planes in made.values())
    experts, error = ternary_experts.slots_of(module)[0].experts, inputs.output_error(made) if inputs else None
    return made, layer_report(name, experts, weights, before, after, every, error)


def _in_bytes(done: Callable[[int], None], parameter: torch.Tensor) -> Callable[[int], None]:
    return lambda weights: done(weights * parameter.element_size())


def layer_report(
    name: str, experts: int, weights: int, before: int, after: int, every: list[Stats], output_error: float | None = None
) -> LayerReport:
    """What became of a module's stacks."""
    errors = [e for stats in every for e in stats.weight_error]
    return LayerReport(
        name=name,
        experts=experts,
        weights=weights,
        bytes_before=before,
        bytes_after=after,
        weight_error=sum(errors) / max(len(errors), 1),
        output_error=output_error,
        methods=dict(sorted(Counter(m for stats in every for m in stats.methods).items())),
        starved=tuple(sorted(set().union(*(stats.starved for stats in every)))),
        notes=dict(sorted(sum((stats.notes for stats in every), Counter[str]()).items())),
    )
