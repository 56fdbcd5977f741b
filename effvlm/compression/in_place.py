"""A model in memory, compressed in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from effvlm.compression import card
from effvlm.compression.calibrate import Session
from effvlm.compression.modules import compress_module
from effvlm.compression.report import LayerReport
from effvlm.compression.shards import sentence_for_disk
from effvlm.hf import own_experts, ternary_experts
from effvlm.hf.enable import disable, is_enabled
from effvlm.quant import TernaryRecipe

Progress = Callable[[int, int, str], None]


def compress_model(
    model: Any,
    recipe: TernaryRecipe,
    activations: str,
    max_memory: int,
    calibration: Iterable[Mapping[str, Any]] | None,
    out: Path | None,
    progress: Progress,
) -> tuple[list[LayerReport], dict[str, str], int, int]:
    """See :func:`effvlm.compress`; gives what became of each layer, what was left alone, and bytes before and after."""
    modules, left_alone = _to_do(model)
    if out is not None and out.exists() and any(out.iterdir()):
        raise ValueError(f"compress: expected out to be a new folder, got {out} with files in it")
    if is_enabled(model):
        disable(model)
    before = _size(model)
    total = sum(_size(module) for module in modules.values())
    done = 0
    layers: list[LayerReport] = []
    with ExitStack() as stack:
        stack.callback(_mark, model, recipe, activations)  # also a model of which only some layers are done
        session = None if calibration is None else stack.enter_context(Session(model, calibration, modules))
        for name in list(modules) if session is None else session.order:

            def advance(size: int, name: str = name) -> None:
                nonlocal done
                done += size
                progress(done, total, name)

            calls = None if session is None else session.see(name)
            planes, report = compress_module(name, modules[name], recipe, activations, max_memory, calls, advance)
            ternary_experts.install(modules[name], planes)
            layers.append(report)
    after = _size(model)
    if out is not None:
        _save(model, out, layers, recipe, activations, before, after)
    return layers, left_alone, before, after


def _to_do(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"compress: expected a Hugging Face model (PreTrainedModel), got {type(model).__name__}")
    modules, left_alone = ternary_experts.found(model)
    if any(map(ternary_experts.is_compressed, modules.values())):
        raise ValueError("compress: expected a model with dense experts, got one that is compressed already")
    shared: set[int] = set()
    for name, module in list(modules.items()):
        own = [module.get_parameter(p) for slot in ternary_experts.slots_of(module) for p in slot.parameters]
        why = own_experts.odd_weight(own) or ("it shares its weights with another" if shared & set(map(id, own)) else "")
        shared |= set(map(id, own))
        if why:
            left_alone[name] = f"{type(modules.pop(name)).__name__}: {why}"
    if not modules:
        told = "; ".join(f"{n}: {w}" for n, w in left_alone.items()) or "none"
        raise ValueError(f"compress: expected a model with routed experts, got {type(model).__name__} without any ({told})")
    return modules, left_alone


def _size(module: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _mark(model: Any, recipe: TernaryRecipe, activations: str) -> None:
    from effvlm.hf.quantizer import EffvlmConfig, mark

    tensors = {name: planes.sizes for name, planes in sorted(ternary_experts.planes_of(model))}
    if tensors:
        mark(model, EffvlmConfig(recipe=recipe.to_dict(), activations=activations, tensors=tensors))


def _save(
    model: Any, out: Path, layers: list[LayerReport], recipe: TernaryRecipe, activations: str, before: int, after: int
) -> None:
    from safetensors import SafetensorError

    with sentence_for_disk(out, "the model"):
        try:
            model.save_pretrained(out)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        card.write_card(out, "", layers, recipe.to_dict(), activations, before, after)
        (out / "compression.jsonl").write_text("".join(json.dumps(layer.to_dict()) + "\n" for layer in layers))
