"""``effvlm.reduce``: fewer visual tokens between a model's vision tower and its language model.

The model encodes its images itself; the method reduces the features; ``input_ids`` loses the placeholders of the tokens that are
gone, and the language model gets the features as ``mm_encoder_outputs`` together with the *original* position ids. All of
these are public arguments of transformers; nothing of the model is patched but the instance's ``generate``, until exit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from effvlm.hf.families import family_of
from effvlm.hf.rows import Rows
from effvlm.tokens import Method, Tokens


class Reducer:
    """What :func:`reduce` returns: a context manager, and :meth:`prepare` for those who want no magic.

    Attributes:
        images: images reduced so far.
        tokens_in: their visual tokens before.
        tokens_out: and after.
    """

    def __init__(self, model: Any, method: Method) -> None:
        if not callable(method) or isinstance(method, type):
            raise TypeError(f"reduce: expected a method such as effvlm.tokens.ToMe(keep=0.25), got {method!r}")
        self.model, self.method, self.family = model, method, family_of(model)
        self.images = self.tokens_in = self.tokens_out = 0
        self._hook: Any = None

    def __enter__(self) -> Reducer:
        if "generate" in vars(self.model):
            raise RuntimeError("reduce: this model is already inside effvlm.reduce; leave that block first")
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model.generate = self._generate
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        del self.model.generate
        self._hook.remove()

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's inputs with fewer visual tokens: give the result to ``model.generate(**…)`` outside the context.

        Args:
            inputs: what the processor returned: ``input_ids`` (B, L), ``attention_mask``, ``pixel_values``, …; ``position_ids``
                default to what ``generate`` would use. Inputs without images come back as they are.

        Raises:
            ValueError: no ``input_ids``, or placeholders that do not match the images.
        """
        mask = inputs.get("attention_mask")
        positions = None if mask is None else (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return self._reduced(dict(inputs), positions)

    def _reduced(self, inputs: dict[str, Any], positions: torch.Tensor | None) -> dict[str, Any]:
        """``inputs`` reduced; ``positions`` (B, L) are the position ids to use when there are none (default 0, 1, 2, …)."""
        if inputs.get("pixel_values") is None:
            return inputs
        arguments = {k: inputs.pop(k) for k in self.family.encoder_arguments if inputs.get(k) is not None}
        if inputs.get("input_ids") is None:
            raise ValueError("reduce: expected input_ids beside pixel_values, got none")
        encoded = self.family.encode(self.model, arguments)
        features, anchors = self._reduce_features(list(encoded.pooler_output))
        encoded.pooler_output = features
        ids = inputs["input_ids"]
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        if inputs.get("attention_mask") is None:
            # Never without one: position ids with gaps and no mask would be taken for several packed sequences.
            inputs["attention_mask"] = torch.ones_like(ids)
        rows = Rows.keeping(ids, inputs["attention_mask"], self.family.placeholder(self.model), anchors)
        pad = getattr(self.model.config, "pad_token_id", None)
        fill = {"input_ids": 0 if pad is None else pad, "attention_mask": 0, "position_ids": 0, "labels": -100}
        for name, value in fill.items():
            if inputs.get(name) is not None:
                inputs[name] = rows.take(inputs[name].expand(ids.shape), value)
        inputs["mm_encoder_outputs"] = {"image": encoded}
        return inputs

    def _reduce_features(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One (N, C) tensor per image → reduced features and, per image, (N,) bool: which places keep their placeholder."""
        reduced: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        same = len({len(f) for f in features}) == 1
        batches = [torch.stack(features)] if same else [f[None] for f in features]
        for x in batches:
            tokens = self.method(Tokens.of(x))
            keep = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            keep.scatter_(1, tokens.position, True)
            reduced += tokens.x.unbind(0)
            places += keep.unbind(0)
        self.images += len(features)
        self.tokens_in += sum(map(len, features))
        self.tokens_out += sum(map(len, reduced))
        return reduced, places

    def _before_forward(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        inputs = {**named.arguments, **named.arguments.get("kwargs", {})}
        inputs.pop("kwargs", None)
        if inputs.get("pixel_values") is None:
            return args, kwargs
        with torch.no_grad():
            return (), self._reduced(inputs, None)

    def _generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` on reduced inputs; the returned sequences start with the whole prompt, as ever."""
        generate = type(self.model).generate
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("pixel_values") is None:
            return generate(self.model, None, *args, **kwargs)
        prompt = kwargs["input_ids"]
        reduced = self.prepare(kwargs)
        gone = prompt.shape[1] - reduced["input_ids"].shape[1]
        for limit in ("max_length", "min_length"):  # they count the prompt
            if reduced.get(limit) is not None:
                reduced[limit] -= gone
        out = generate(self.model, None, *args, **reduced)
        if isinstance(out, torch.Tensor):
            return _with_prompt(out, prompt, gone)
        out.sequences = _with_prompt(out.sequences, prompt, gone)
        return out


def _with_prompt(sequences: torch.Tensor, prompt: torch.Tensor, gone: int) -> torch.Tensor:
    """(B·k, L − gone + new) → (B·k, L + new): the shortened prompt of every row replaced by its original."""
    rows = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    return torch.cat([rows, sequences[:, prompt.shape[1] - gone :]], dim=1)


def reduce(model: Any, method: Method) -> Reducer:
    """Run ``model`` with fewer visual tokens inside a ``with`` block; everything is undone on exit.

    ::

        with effvlm.reduce(model, effvlm.tokens.ToMe(keep=0.25)):
            model.generate(**inputs)

    Works with ``generate()`` (greedy, sampling, beams), batches with padding, several images per prompt, and plain
    ``model(**inputs)`` (whose logits then belong to the shorter sequence). Token positions stay the original ones. One block
    per model at a time; a model shared by threads is reduced for all of them.

    Args:
        model: a Hugging Face image-text-to-text model of a supported family (LLaVA).
        method: what to do with the tokens, see :mod:`effvlm.tokens`.

    Returns:
        The :class:`Reducer`, which counts images and tokens.

    Raises:
        TypeError: ``model`` is no such model, or ``method`` is not callable on tokens.
        ValueError: the family is not supported.
    """
    return Reducer(model, method)
