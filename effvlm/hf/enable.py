"""``effvlm.enable``: a Hugging Face model's experts, mixers and linear layers on our kernels, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from effvlm.hf import experts, linears, mixers
from effvlm.hf.enable_report import EnableReport

_before: WeakKeyDictionary[torch.nn.Module, tuple[list[Callable[[], None]], EnableReport]] = WeakKeyDictionary()


def enable(model: Any, free_original: bool = False) -> EnableReport:
    """Run a model's experts, Mamba-like mixers and, on a CPU, linear layers on effvlm's kernels: same outputs, within rounding.

    ::

        report = effvlm.enable(model)
        print(report)          # what runs now, what does not, and why

    Works with ``generate()``, batches, caches, ``torch.compile`` and saving. What our kernels do not take (a dtype, a device)
    runs transformers' own functions, and so do the experts of a model in training, which is said once; scans have gradients.
    Linear layers of 2¹⁶ weights or more that are on the CPU run our kernel for up to 8 tokens at a time, as in decoding, and
    torch's for more.
    Other models are not affected, of the same family neither, unless they share their config. Undone by :func:`disable`.

    Args:
        model: a Hugging Face model.
        free_original: where experts are modules of their own (Switch, NLLB, ViTPose) the kernels need them in one tensor, a
            copy that the report states; with True the parameters become views of it, so that memory stays as it was. All other
            weights are read in place, and both values do the same.

    Returns:
        The report. Calling it again returns the same one.

    Raises:
        TypeError: not a Hugging Face model.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "set_experts_implementation"):
        raise TypeError(f"enable: expected a Hugging Face model, got {type(model).__name__}")
    if model in _before:
        return _before[model][1]
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(experts.KEY, experts.experts_forward)
    report = EnableReport()
    undo: list[Callable[[], None]] = []
    tried: dict[str, bool] = {}
    for name, module in model.named_modules():
        experts.consider(name, module, report, undo, tried, free_original)
        mixers.consider(name, module, report, undo)
        linears.consider(name, module, report, undo)
    _before[model] = (undo, report)
    return report


def is_enabled(model: Any) -> bool:
    """Whether :func:`enable` was called on a model, and :func:`disable` not since."""
    return model in _before


def disable(model: Any) -> None:
    """Undo :func:`enable`: every config selects what it selected before, every instance has its class's forward.

    Raises:
        RuntimeError: the model is not enabled.
    """
    if model not in _before:
        raise RuntimeError("disable: expected a model that effvlm.enable was called on")
    for step in _before.pop(model)[0]:
        step()
