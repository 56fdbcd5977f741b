"""Dense models and the mixtures of experts in transformers that share everything with them but the feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_INERT = ("max_window_layers", "pretraining_tp")  # without effect while every layer attends to everything, and in these classes


Extra = Callable[[Any, set[str]], dict[str, Any]]


@dataclass(frozen=True)
class Sibling:
    """A pair of families.

    Attributes:
        dense, moe: the words that their classes begin with.
        count: the mixture's config field with the number of experts.
        block, router: names of the module with experts in a layer, and of the router in it.
        inner: the mixture's field with the experts' inner size.
        normalised: the field that says that weights of the choices sum to 1; None where they always do.
        fields: other fields of the mixture, so that every layer has experts.
    """

    dense: str
    moe: str
    count: str
    block: str = "mlp"
    router: str = "gate"
    inner: str = "intermediate_size"
    normalised: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


_EVERY_LAYER: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
SIBLINGS = (
    Sibling("Qwen3VL", "Qwen3VLMoe", "num_local_experts", inner="moe_intermediate_size", fields=_EVERY_LAYER),
    Sibling(
        "Qwen3", "Qwen3Moe", "num_local_experts", inner="moe_intermediate_size", normalised="norm_topk_prob", fields=_EVERY_LAYER
    ),
    Sibling("Mistral", "Mixtral", "num_local_experts"),
    Sibling("Llama", "Mixtral", "num_local_experts"),
    Sibling("Granite", "GraniteMoe", "num_local_experts", block="block_sparse_moe", router="router"),
)


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name, None)


def find(model: Any, *, dense: bool) -> tuple[Sibling, Any] | None:
    """The pair of a dense model (or of a mixture), and the class on the other side; None if there is none."""
    name = type(model).__name__
    for pair in SIBLINGS:
        own, other = (pair.dense, pair.moe) if dense else (pair.moe, pair.dense)
        rest = name.removeprefix(own)
        if rest != name and _class(name) is type(model) and rest[:3] in ("For", "Mod") and _class(other + rest) is not None:
            return pair, _class(other + rest)
    return None


def convert(method: str, config: Any, to: Any, extra: Extra, lost: tuple[str, ...] = ()) -> Any:
    """A config of class ``to`` with everything that ``config`` says.

    Args:
        method: who asks, for messages.
        config: of the one class.
        to: the other class.
        extra: gets a config and the fields of its other class, gives fields for it.
        lost: parts of names of fields that need no counterpart.

    Raises:
        ValueError: a field that changes what is computed has no counterpart.
    """
    theirs, values = set(to().to_dict()), {}
    for key, value in config.to_dict().items():
        if key in ("architectures", "model_type", "transformers_version", "dtype"):
            continue
        if key in config.sub_configs:
            value = convert(method, getattr(config, key), to.sub_configs[key], extra, lost).to_dict()
        elif key not in theirs and key != "head_dim" and not _inert(config, key, value, lost):
            usual = getattr(type(config)(), key, None)
            raise ValueError(f"{method}: expected {key} to be {usual!r}, which {to.__name__} lacks, got {value!r}")
        values[key] = value
    kept = {key: value for key, value in values.items() if key in theirs or key == "head_dim"}
    return to(**(kept | extra(config, theirs)))


def _inert(config: Any, key: str, value: Any, lost: tuple[str, ...]) -> bool:
    if key == "layer_types":
        return all(kind == "full_attention" for kind in value)
    if key in _INERT or key.endswith("_token_id"):  # those are for generate(), whose config is copied
        return True
    return any(part in key for part in lost) or value == getattr(type(config)(), key, None)


def build(method: str, model: Any, cls: Any, config: Any) -> Any:
    """A model of class ``cls`` without values yet, in the dtype and on the device of ``model``, in eval mode."""
    from transformers.initialization import no_init_weights

    first = next(model.parameters())
    with torch.device(first.device), no_init_weights():
        made = cls._from_config(config, dtype=first.dtype)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.eval()


def fill(method: str, made: Any, values: Callable[[str], torch.Tensor]) -> None:
    """Give every parameter of ``made`` its value by name.

    Raises:
        ValueError: a parameter has none, or one of another shape.
    """
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            try:
                value = values(name)
            except KeyError as error:
                raise ValueError(f"{method}: expected a weight {error} for {type(made).__name__}, got none") from error
            if value.shape != parameter.shape:
                raise ValueError(f"{method}: expected {name} of shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
            parameter.copy_(value)
