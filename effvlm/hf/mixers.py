"""Mamba-like mixers on our scans: the instances of a loaded model, or their classes before one is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from effvlm.hf.enable_report import EnableReport
from effvlm.hf.instances import REPLACED, replace_forward
from effvlm.hf.rebind import forward_with_ours, scans_of

_OPS = {
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "selective_scan_fn": "selective_scan",
    "selective_state_update": "state_update",
    "mamba_chunk_scan_combined": "chunk_scan",
    "chunk_gated_delta_rule": "chunk_scan",
    "fused_recurrent_gated_delta_rule": "state_update",
    "chunk_kda": "chunk_scan",
    "fused_recurrent_kda": "state_update",
}


def consider(name: str, module: Any, report: EnableReport, undo: list[Callable[[], None]]) -> None:
    """Put one module on our scans, if its class calls any: said in ``report``, undone by ``undo``."""
    kind: Any = type(module)
    if "_effvlm_scans" in vars(kind):
        report.modules[name] = f"{_ops(kind._effvlm_scans)}; its class was replaced when it was loaded"
        return
    found = scans_of(kind)
    if not found:
        return
    back = replace_forward(module, forward_with_ours(kind))
    if back is None:
        report.fallbacks[name] = REPLACED.format(kind.__name__)
        return
    undo.append(back)
    report.modules[name] = _ops(found)


def _ops(found: Any) -> str:
    return ", ".join(sorted({_OPS[known] for known in found.values() if known in _OPS}))


@cache
def _with_ours(kind: Any) -> type:
    """A subclass whose forward calls our functions; of the same name, which device maps and reports go by."""
    body = {"forward": forward_with_ours(kind), "_effvlm_scans": scans_of(kind), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def replace_classes(*model_types: str) -> list[str]:
    """Have models of these types built with our scans from the start, by transformers' own registry of replacements.

    For loading paths that leave no room for :func:`effvlm.enable` after them. It holds for every model loaded from then on, by
    ``from_pretrained`` or ``from_config``, until :func:`restore_classes`.

    Args:
        model_types: as in ``config.model_type``, for instance ``"falcon_mamba"`` or ``"qwen3_5"``.

    Returns:
        The names of the replaced classes.

    Raises:
        ValueError: transformers has no such model type, or none of its classes calls a scan.
    """
    from transformers.monkey_patching import register_patch_mapping

    mapping: dict[str, Any] = {}
    for model_type in model_types:
        found = mixers_of(model_type)
        if not found:
            raise ValueError(f"replace_classes: expected model types with Mamba-like mixers, got {model_type!r}")
        mapping |= {kind.__name__: _with_ours(kind) for kind in found}
    register_patch_mapping(mapping, overwrite=True)
    return sorted(mapping)


def restore_classes() -> None:
    """Undo :func:`replace_classes` for models loaded from now on; those that are loaded keep what they have."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    unregister_patch_mapping([name for name, kind in get_patch_mapping().items() if "_effvlm_scans" in vars(kind)])


def mixers_of(model_type: str) -> list[Any]:
    try:
        modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    except ImportError as error:
        raise ValueError(f"replace_classes: transformers has no model type {model_type!r}") from error
    classes: list[Any] = [
        kind for kind in vars(modeling).values() if isinstance(kind, type) and kind.__module__ == modeling.__name__
    ]
    return [kind for kind in classes if issubclass(kind, torch.nn.Module) and scans_of(kind)]
