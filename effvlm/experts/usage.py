"""How often each expert is chosen, and with what weight: the figures by which experts are dropped, merged or copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effvlm.experts.layers import routed

Tokens = Callable[[Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Usage:
    """What :func:`usage` measured; ``print`` it for a table.

    Attributes:
        counts: name of each module of experts → (E,) int64, how many tokens chose each expert.
        weights: name → (E,) float64, the sum of the routing weights of these choices.
    """

    counts: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    def __str__(self) -> str:
        width = max(map(len, self.counts), default=5)
        lines = [f"{'layer':{width}}  {'choices':>9}  {'used':>9}  {'never':>5}  {'busiest':>8}  entropy (bits)"]
        for name, counts in self.counts.items():
            E, total, used = len(counts), int(counts.sum()), int((counts > 0).sum())
            share = counts.double() / max(total, 1)
            entropy = float(-(share * share.clamp(min=1e-300).log2()).sum()) + 0.0  # no minus before a zero
            most = torch.tensor(float(E)).log2().item()
            lines.append(
                f"{name:{width}}  {total:>9,}  {f'{used} of {E}':>9}  {E - used:>5}  {100 * float(share.max()):>6.1f} %  "
                f"{entropy:.2f} of {most:.2f}"
            )
        return "\n".join(lines)

    def balanced(self, *others: Usage) -> Usage:
        """The sum of several, each with the same say in every layer: of text and of visual tokens, or of several tasks.

        Counts are added as they are; weights of each are first divided by their sum in the layer.

        Raises:
            ValueError: another was measured on other layers.
        """
        every = (self, *others)
        for other in others:
            if {n: len(w) for n, w in other.weights.items()} != {n: len(w) for n, w in self.weights.items()}:
                raise ValueError("balanced: expected usage of the same layers, got others")
        counts = {n: torch.stack([u.counts[n] for u in every]).sum(0) for n in self.counts}
        share = {n: torch.stack([u.weights[n] / u.weights[n].sum().clamp(min=1e-300) for u in every]) for n in self.weights}
        return Usage(counts, {n: s.sum(0) for n, s in share.items()})

    def order(self, name: str) -> torch.Tensor:
        """(E,) ids of one layer's experts, the most used first: by routing weight, ties to lower ids."""
        return self.weights[name].sort(descending=True, stable=True).indices


class _Counter:
    """The hooks and their sums."""

    def __init__(self, modules: dict[str, Any], tokens: Tokens | None) -> None:
        self.modules, self.tokens = modules, tokens
        self.counts = {name: torch.zeros(m.num_experts, dtype=torch.int64) for name, m in modules.items()}
        self.weights = {name: torch.zeros(m.num_experts, dtype=torch.float64) for name, m in modules.items()}
        self.mask: torch.Tensor | None = None  # (B·S,) bool of the batch that runs: what is counted

    def hook(self, name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            ids, weights = given["top_k_index"].cpu(), given["top_k_weights"].detach().double().cpu()
            E = len(self.counts[name])
            seen = (ids >= 0) & (ids < E) & (weights != 0)  # outside and zero: what routers say for "no expert"
            if self.mask is not None and len(self.mask) == len(ids):
                seen &= self.mask[:, None]
            self.counts[name] += ids[seen].bincount(minlength=E)
            self.weights[name] += ids[seen].bincount(weights[seen], minlength=E)

        return see

    def run(self, model: Any, inputs: Any) -> None:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"usage: expected inputs as dicts for model(**inputs), got {type(inputs).__name__}")
        masks = [inputs.get("attention_mask"), self.tokens(inputs) if self.tokens else None]
        flat = [m.flatten().bool().cpu() for m in masks if isinstance(m, torch.Tensor) and m.dim() == 2]
        self.mask = torch.stack(flat).all(0) if flat else None
        model(**inputs)


@torch.no_grad()
def usage(model: Any, calibration: Iterable[Mapping[str, Any]] | Callable[[Any], Any], *, tokens: Tokens | None = None) -> Usage:
    """Run a model and count which experts its tokens choose.

    ::

        measured = effvlm.experts.usage(model, [processor(images=i, text=t, return_tensors="pt") for i, t in samples])
        print(measured)

    The model runs without gradients and in eval mode; its modes are restored and the hooks removed, also after an exception.
    Where a batch has a (B, S) ``attention_mask``, its padding is not counted. Ids outside 0 … E−1 (what expert parallelism says
    for "not mine") and choices of weight zero are not counted either.

    Args:
        model: with routed experts.
        calibration: inputs, each a dict for ``model(**inputs)``, on the model's device; or a function that is called with the
            model and runs it as it likes, with ``generate()`` for instance (padding is then counted).
        tokens: gets a batch's inputs, gives a (B, S) bool tensor of the tokens to count, such as
            ``lambda inputs: inputs["input_ids"] != image_token_id``; default all. Visual tokens are most of a prompt, and outvote
            the few that ask and answer: measure both and :meth:`Usage.balanced` them. Layers that see other tokens (of a vision
            tower) count all of theirs.

    Returns:
        Counts and sums of routing weights per layer and expert.

    Raises:
        TypeError: ``calibration`` is neither, or its items are no dicts.
        ValueError: the model has no routed experts, or none of them ran.
    """
    counter = _Counter(routed(model, "usage"), tokens)
    if isinstance(calibration, Mapping) or not (callable(calibration) or isinstance(calibration, Iterable)):
        raise TypeError(
            f"usage: expected an iterable of dicts of inputs, or a function of the model, got {type(calibration).__name__}"
        )
    hooks = [m.register_forward_pre_hook(counter.hook(name), with_kwargs=True) for name, m in counter.modules.items()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        if callable(calibration):
            calibration(model)
        else:
            for inputs in calibration:
                counter.run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not any(int(c.sum()) for c in counter.counts.values()):
        raise ValueError("usage: expected a calibration that runs the experts, got none of their choices")
    return Usage(counter.counts, counter.weights)


def check_usage(method: str, usage: Any, layers: dict[str, Any]) -> Usage:
    """Raise unless ``usage`` was measured on these layers."""
    if not isinstance(usage, Usage):
        raise TypeError(f"{method}: expected usage from effvlm.experts.usage, got {type(usage).__name__}")
    had = {name: len(w) for name, w in usage.weights.items()}
    wanted = {name: m.num_experts for name, m in layers.items()}
    if had != wanted:
        name = next(n for n in [*wanted, *had] if had.get(n) != wanted.get(n))
        raise ValueError(f"{method}: expected usage of this model: {name} has {wanted.get(name)} experts, got {had.get(name)}")
    return usage
