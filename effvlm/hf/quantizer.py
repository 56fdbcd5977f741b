"""Compressed models as transformers saves and loads them: the quantisation method ``"effvlm"``.

transformers knows it once effvlm is imported (:mod:`effvlm.hf.registration`). Tensors of experts stay what the loader makes of
them, views of memory-mapped files, so that a model larger than memory runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from effvlm.hf import ternary_experts
from effvlm.hf.planes import ACTIVATIONS, Planes
from effvlm.ops.ternary_weight import PARTS

METHOD, VERSION = "effvlm", 1


@register_quantization_config(METHOD)
class EffvlmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of a compressed model.

    Args:
        version: of this description.
        recipe: fields of the :class:`~effvlm.quant.TernaryRecipe` that made the weights.
        activations: what the products of experts do with their input, ``"exact"`` or ``"int8"``.
        tensors: full name of each compressed stack → E, R, C and the number of words of its data.
        quant_method: always ``"effvlm"``.

    Raises:
        ValueError: a later version, or unknown activations.
    """

    def __init__(
        self,
        version: int = VERSION,
        recipe: Mapping[str, Any] | None = None,
        activations: str = "exact",
        tensors: Mapping[str, Sequence[int]] | None = None,
        quant_method: str = METHOD,
        **later: Any,
    ) -> None:
        if version != VERSION or later:
            raise ValueError(f"effvlm: expected a model compressed in version {VERSION}, got {version}; a newer effvlm reads it")
        if activations not in ACTIVATIONS:
            raise ValueError(f"effvlm: expected activations 'exact' or 'int8', got {activations!r}")
        self.quant_method, self.version, self.activations = quant_method, version, activations
        self.recipe = dict(recipe or {})
        self.tensors = {name: list(sizes) for name, sizes in (tensors or {}).items()}


@register_quantizer(METHOD)
class EffvlmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts :class:`~effvlm.hf.planes.Planes` in the place of experts' parameters, for the loader to fill."""

    quantization_config: EffvlmConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what is to be compressed while it loads."""
        if not self.pre_quantized:
            raise ValueError("effvlm: expected a compressed model; effvlm.compress makes one, from_pretrained does not")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, module in ternary_experts.found(model)[0].items():
            products = {}
            for slot in ternary_experts.slots_of(module):
                sizes = self._sizes(f"{name}.{slot.path}", model.base_model_prefix)
                if sizes is None:
                    continue
                E, R, C, words = sizes
                shape = slot.shape(module)
                if shape != (E, R, C):
                    raise ValueError(f"effvlm: expected {name}.{slot.path} of shape {shape} by its config, got {(E, R, C)}")
                products[slot.path] = Planes.empty((E, R, C, words), self.quantization_config.activations)
            if products:
                ternary_experts.install(module, products)

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _own(list(self.quantization_config.tensors))

    def _sizes(self, name: str, prefix: str) -> list[int] | None:
        """Of the stack with this name, which the class that saved it may have called by another prefix."""
        tensors = self.quantization_config.tensors
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((tensors[n] for n in names if n in tensors), None)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, planes in ternary_experts.planes_of(model):
            try:
                planes.weight  # noqa: B018 - reads the header, and what was moved to a device is checked
            except ValueError as error:
                raise ValueError(f"effvlm: {name} was not loaded, or is damaged: {error}") from error
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """What a tensor is cast to while it loads; ours to nothing."""
        own = any(self._ours.search(key) for key in converter.target_patterns)
        return None if own else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' conversions, which shall leave our tensors alone."""
        return spared(super().update_weight_conversions(weight_conversions, model), list(self.quantization_config.tensors))

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16  # a saved config has its name
        for module in ternary_experts.found(model)[0].values():
            if ternary_experts.is_compressed(module):
                ternary_experts.uninstall(module, wanted)
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Kernels are forward only."""
        return False


class _Sparing(WeightConverter):  # type: ignore[misc]
    """A converter that leaves compressed tensors alone, whose names hold that of what they were made of."""

    __slots__ = ("own",)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self.own.search(source_key):
            return source_key, None
        key, pattern = super().rename_source_key(source_key)
        return str(key), pattern

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        made = super().copy(source_patterns, target_patterns, **kwargs)
        made.own = self.own
        return made


def _own(names: Sequence[str]) -> re.Pattern[str]:
    """Matches keys of the compressed tensors of some stacks, however their names begin."""
    tails = sorted({re.escape(".".join(name.split(".")[-2:])) for name in names})
    return re.compile(rf"(^|\.)({'|'.join(tails) or '(?!)'})\.({'|'.join(PARTS)})$")


def spared(conversions: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Conversions of a checkpoint's tensors that leave those of the compressed stacks of these names alone."""
    made = []
    for one in conversions:
        if isinstance(one, WeightConverter) and not isinstance(one, _Sparing):
            new = _Sparing(
                list(one._original_source_patterns), list(one._original_target_patterns), one.operations, one.force_cpu
            )
            new.scope_prefix, new.base_model_prefix, new._was_used = one.scope_prefix, one.base_model_prefix, one._was_used
            new.own = _own(names)
            one = new
        made.append(one)
    return made


def mark(model: Any, config: EffvlmConfig) -> None:
    """Make transformers treat a model that was compressed in memory as one that it loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    quantizer = EffvlmQuantizer(config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    quantizer.postprocess_model(model)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # what save_pretrained would take
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    model._weight_conversions = spared(conversions, list(config.tensors))
