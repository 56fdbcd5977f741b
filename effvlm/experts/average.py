"""Average experts (Huang et al., "Experts Weights Averaging", arXiv 2308.06093): towards their mean, or into a dense model."""

from __future__ import annotations

import re
from typing import Any

import torch

from effvlm._library import FLOATS
from effvlm.experts import siblings
from effvlm.experts.layers import fused, routed
from effvlm.experts.report import Report, counts, parameters


class AverageReport(Report):
    """What :func:`average` did; ``model`` is a new one if it was asked for a dense one."""


def average(model: Any, beta: float = 1.0, *, dense: bool = False) -> AverageReport:
    """Move every expert of a layer towards the mean of all: ``W_e ← (1 − beta) · W_e + beta · mean``. Routers stay as they are.

    The two halves of EWA: called after each step or epoch of training with a small ``beta`` it keeps experts close enough to be
    averaged at the end; then ``dense=True`` puts the mean into an ordinary feed-forward, and the mixture was a way to train it
    that costs nothing at inference. The mean of experts that were not trained like this is a baseline, seldom a good model.

    Args:
        model: a model with routed experts, changed in place unless ``dense``.
        beta: in (0, 1]; 1 makes all experts of a layer equal. Outputs then no longer depend on the choice of experts where a
            router normalises its weights.
        dense: leave ``model`` as it is, and return (in the report) the dense model of the same layout in transformers, with the
            mean as its feed-forward: Qwen3-MoE → Qwen3, Qwen3-VL-MoE → Qwen3-VL, Mixtral → Mistral, GraniteMoE → Granite. It
            computes what the mixture with ``beta=1`` does.

    Returns:
        The report.

    Raises:
        ValueError: no routed experts, ``beta`` outside (0, 1] (or not 1 with ``dense``), experts that are quantised or offloaded;
            for ``dense``: no such sibling, weights of choices that do not sum to 1, or layers that do not fit.
        TypeError: not a model, or ``beta`` is no number.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"average: expected beta to be a number in (0, 1], got {type(beta).__name__}")
    if not 0 < beta <= 1 or (dense and beta != 1):
        raise ValueError(f"average: expected beta {'1 for a dense model' if dense else 'in (0, 1]'}, got {beta}")
    modules = routed(model, "average")
    for name, module in modules.items():
        for tensor in fused(module):
            weight = getattr(module, tensor)
            if weight.dtype not in FLOATS or weight.is_meta:
                raise ValueError(
                    f"average: expected {name}.{tensor} in floating point on a device, got {weight.dtype}, {weight.device}"
                )
    before, experts = parameters(model), counts(m.num_experts for m in modules.values())
    if dense:
        made = _dense(model)
        return AverageReport("average", tuple(modules), (before, parameters(made)), (experts, "1 (dense)"), made)
    with torch.no_grad():
        for module in modules.values():
            for tensor in fused(module):
                weight = getattr(module, tensor)
                mean = weight.float().mean(0, keepdim=True)
                weight.copy_(weight.float().lerp(mean, beta) if beta < 1 else mean.expand_as(weight))
    return AverageReport("average", tuple(modules), (before, before), (experts, experts), model)


def _dense(model: Any) -> Any:
    """The dense sibling with the mean expert in every layer."""
    found = siblings.find(model, dense=False)
    if found is None:
        names = ", ".join(dict.fromkeys(pair.moe for pair in siblings.SIBLINGS))
        raise ValueError(f"average: expected a mixture with a dense sibling ({names}), got {type(model).__name__}")
    pair, cls = found
    text = model.config.get_text_config()
    if pair.normalised and not getattr(text, pair.normalised):
        raise ValueError(f"average: expected {pair.normalised}=True, got False: weights that do not sum to 1 are no mean")

    def extra(config: Any, fields: set[str]) -> dict[str, Any]:
        return {"intermediate_size": getattr(config, pair.inner)} if hasattr(config, pair.count) else {}

    lost = ("expert", "router", "moe", "norm_topk_prob", *pair.fields)
    made = siblings.build("average", model, cls, siblings.convert("average", model.config, cls.config_class, extra, lost))
    held: dict[str, torch.Tensor] = dict(model.named_parameters())

    def value(name: str) -> torch.Tensor:
        part = re.fullmatch(r"(.*\.)mlp\.(gate|up|down)_proj\.weight", name)
        prefix = f"{part[1]}{pair.block}.experts." if part else ""
        if part is None or f"{prefix}down_proj" not in held:
            return held[name]
        if part[2] == "down":
            return held[f"{prefix}down_proj"].float().mean(0)
        return held[f"{prefix}gate_up_proj"].float().mean(0).chunk(2)[part[2] == "up"]

    siblings.fill("average", made, value)
    return made
