"""``distill``: teach converted layers what the attention they replaced did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import kl_div, log_softmax

from effvlm.convert.attention import SSMAttention


@dataclass
class Distilled:
    """What :func:`distill` did.

    Attributes:
        losses: of every step, in order.
        stage: ``"layers"`` or ``"logits"``, per step.
    """

    losses: list[float] = field(default_factory=list)
    stage: list[str] = field(default_factory=list)


class Batches(Protocol):
    """Keyword arguments for a model, by number; a list of dictionaries will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Mapping[str, torch.Tensor]: ...


def distill(
    student: Any,
    teacher: Any,
    batches: Batches,
    *,
    layer_steps: int,
    lr: float = 1e-3,
    everything: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Train a converted model on the outputs of the one it was converted from: first layer by layer, then its logits.

    For the first ``layer_steps`` batches, every converted layer sees what the teacher's layer saw and learns to return what it
    returned (mean square error over all tokens), all layers at once; then the student runs by itself and learns the teacher's
    next-token distribution (Kullback-Leibler divergence) until the batches end. Adam, learning rate falling linearly to 0 in
    each stage, no labels.

    Args:
        student: a model after :func:`effvlm.convert.attention_to_ssm`; left in the training mode it came in.
        teacher: the model before (a copy of it), left as it is.
        batches: keyword arguments for both models, with ``attention_mask`` where there is padding; anything with a length that
            gives a batch for a number.
        layer_steps: how many of the batches are for the first stage.
        lr: where the learning rate starts.
        everything: in the second stage train all of the student's parameters; default those of the converted layers.
        on_step: called with the number and loss of every step.

    Raises:
        ValueError: the student has no converted layers.

    Source: Liao et al. 2025 (mmMamba), whose first two stages are one here.
    """
    pairs = [(name, m) for name, m in student.named_modules() if isinstance(m, SSMAttention)]
    if not pairs:
        raise ValueError("distill: expected a student with layers converted by effvlm.convert.attention_to_ssm, found none")
    first, steps = min(layer_steps, len(batches)), len(batches)
    own = [p for _, m in pairs for p in m.parameters()]
    later = list(student.parameters()) if everything else own
    teach = Teaching(batches, lr, on_step)
    required = {p: p.requires_grad for p in student.parameters()}
    try:
        teach.stage("layers", range(first), required, own, lambda batch: _layer_loss(pairs, teacher, batch))
        teach.stage("logits", range(first, steps), required, later, lambda batch: _logit_loss(student, teacher, batch))
    finally:
        for p, needed in required.items():
            p.requires_grad_(needed)
    return teach.done


class Teaching:
    """The steps of a distillation, and what became of them."""

    def __init__(self, batches: Batches, lr: float, on_step: Callable[[int, float], None] | None) -> None:
        self.batches, self.lr, self.on_step, self.done = batches, lr, on_step, Distilled()

    def stage(
        self,
        name: str,
        steps: range,
        known: Iterable[torch.nn.Parameter],
        trained: list[torch.nn.Parameter],
        loss_of: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    ) -> None:
        """Train some of the parameters on some of the batches."""
        chosen = set(map(id, trained))
        for p in known:
            p.requires_grad_(id(p) in chosen)
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        for i, step in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - i / len(steps))
            loss = loss_of(self.batches[step])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            self.done.losses.append(loss.item())
            self.done.stage.append(name)
            if self.on_step:
                self.on_step(len(self.done.losses), self.done.losses[-1])


def _weights(batch: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """(B, L, 1): 1 for tokens, 0 for padding."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(like[..., :1]) if mask is None else mask[..., None].to(like)).float()


def _layer_loss(pairs: list[tuple[str, SSMAttention]], teacher: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean square error of every converted layer on the teacher's own inputs, relative to what the teacher returned."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs, output: seen.__setitem__(name, (args, kwargs, output[0]))

    hooks = [teacher.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name, _ in pairs]
    try:
        with torch.no_grad():
            teacher(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    losses = []
    for name, module in pairs:
        args, kwargs, wanted = seen[name]
        got = module(*args, **(kwargs | {"past_key_values": None}))[0]
        weight = _weights(batch, got)
        error = (weight * (got.float() - wanted.float()).square()).sum()
        losses.append(error / (weight * wanted.float().square()).sum())
    return torch.stack(losses).mean()


def _logit_loss(student: Any, teacher: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        wanted = log_softmax(teacher(**batch, use_cache=False).logits.float(), -1)
    got = log_softmax(student(**batch, use_cache=False).logits.float(), -1)
    weight = _weights(batch, got)
    return (weight * kl_div(got, wanted, log_target=True, reduction="none")).sum() / weight.sum()
