"""Routed experts below one bit per weight: a model, or a folder with one, to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effvlm.compression.report import CompressReport, LayerReport
from effvlm.compression.stacks import DEFAULT_MEMORY
from effvlm.hf.planes import ACTIVATIONS
from effvlm.quant import TernaryRecipe

__all__ = ["CompressReport", "LayerReport", "compress", "parse_memory"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def compress(
    model_or_path: Any,
    recipe: TernaryRecipe | Mapping[str, Any] | str | Path | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    max_memory: int | str | None = None,
    resume: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    activations: str | None = None,
) -> CompressReport:
    """Store the weights of routed experts as ternary matrices, below one bit each, and run on them.

    ::

        report = effvlm.compress("Qwen3-30B-A3B", out="small")        # a folder: layer by layer, never in memory as a whole
        print(report)
        model = AutoModelForCausalLM.from_pretrained("small")          # transformers' own, after import effvlm

        report = effvlm.compress(model, {"target_bits": 0.8}, calibration=batches)      # a model, in place

    A folder's work is kept part by part: the same call again goes on where the last one was killed, and ends with the same bytes.
    A model is compressed in place; ``model.dequantize()`` makes dense parameters of the same values again, and
    ``save_pretrained`` and ``from_pretrained`` work.

    Args:
        model_or_path: a Hugging Face model, or a folder with ``config.json`` and safetensors.
        recipe: a :class:`~effvlm.quant.TernaryRecipe`, its fields, or a YAML file with them (``activations`` may be among
            them); None for the default one, by rounding to nearest where there is no calibration.
        calibration: inputs, each a dict for ``model(**inputs)``; padding is not counted where ``attention_mask`` says so.
            Layers are then compressed one after the other, each for what it sees behind those before. A folder's model is loaded
            for that.
        out: new folder for the result; needed with a folder, optional with a model.
        max_memory: bytes, or for instance ``"4GB"``, that weights under way may take, besides Python and its libraries (about
            0.4 GB) and a model that is in memory anyway; default 1 GiB. A folder's model that calibration loads counts.
        resume: go on with unfinished work in ``out``; otherwise begin again.
        progress: called with bytes done, bytes in all, and what is being done.
        activations: ``"exact"``, or ``"int8"`` for about 1.5 times the speed (see :func:`effvlm.ternary_matmul`); saved with the
            model.

    Returns:
        What was done to each layer, with measured errors, sizes, time and memory; ``print`` it.

    Raises:
        TypeError: neither a model nor a path.
        ValueError: no routed experts, quantised weights, a damaged file, calibration that the model does not take, a recipe's
            unknown field or value, too little ``max_memory``, or an ``out`` with other files.
        OSError: the disk is full; finished parts are kept.
    """
    from effvlm.compression import folder, in_place
    from effvlm.compression.card import peak_memory

    start = time.perf_counter()
    chosen, mode = _recipe(recipe, activations, calibration is not None)
    say = progress or (lambda done, total, what: None)
    memory = None if max_memory is None else parse_memory(max_memory)
    if isinstance(model_or_path, torch.nn.Module):
        target = None if out is None else Path(out)
        made = in_place.compress_model(model_or_path, chosen, mode, memory or DEFAULT_MEMORY, calibration, target, say)
    elif isinstance(model_or_path, (str, Path)):
        if out is None:
            raise ValueError("compress: expected out, a folder for the result, with the path of a model; got none")
        made = folder.compress_folder(Path(model_or_path), Path(out), chosen, mode, memory, calibration, resume, say)
    else:
        raise TypeError(f"compress: expected a model, or a folder with one, got {type(model_or_path).__name__}")
    layers, left_alone, before, after = made
    seconds, written = time.perf_counter() - start, None if out is None else str(out)
    return CompressReport(layers, left_alone, before, after, peak_memory(), seconds, written)


def _recipe(recipe: Any, activations: str | None, calibrated: bool) -> tuple[TernaryRecipe, str]:
    """The recipe and the activations that all the ways to give them say."""
    if isinstance(recipe, (str, Path)):
        recipe = read_recipe(Path(recipe))
    if isinstance(recipe, Mapping):
        fields = dict(recipe)
        activations = activations or fields.pop("activations", None)
        fields.pop("activations", None)
        recipe = TernaryRecipe.from_dict(({} if calibrated else {"method": "rtn"}) | fields)
    if recipe is None:
        recipe = TernaryRecipe() if calibrated else replace(TernaryRecipe(), method="rtn")
    if not isinstance(recipe, TernaryRecipe):
        raise TypeError(f"compress: expected a TernaryRecipe, its fields or a YAML file, got {type(recipe).__name__}")
    if recipe.method != "rtn" and not calibrated:
        raise ValueError(f"compress: expected calibration for method {recipe.method!r}, got none; method 'rtn' needs none")
    activations = activations or "exact"
    if activations not in ACTIVATIONS:
        raise ValueError(f"compress: expected activations 'exact' or 'int8', got {activations!r}")
    return recipe, activations


def read_recipe(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise ValueError(f"compress: expected a recipe as a YAML file, got {path}, which is none")
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"compress: expected {path} to be YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"compress: expected {path} to have a recipe's fields, such as 'target_bits: 0.8', got {fields!r}")
    return fields


def parse_memory(text: int | str) -> int:
    """Bytes of ``"400MB"``, ``"4 GiB"`` or a number.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"compress: expected max_memory as bytes, or like '4GB', got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])
