"""``effvlm.reduce``: fewer visual tokens between a model's vision tower and its language model, or already inside the tower.

The model encodes its images itself; the recipe reduces the features; ``input_ids`` loses the placeholders of the tokens that are
gone, and the language model gets the features as ``mm_encoder_outputs`` together with the *original* position ids. All of
these are public arguments of transformers; nothing of the model is patched but the instance's ``generate``, until exit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from effvlm.hf.attention import language_attention, listening
from effvlm.hf.encode import Encoder, pixels_of
from effvlm.hf.positions import positions_for_forward, positions_for_generate
from effvlm.hf.proportional import Proportional
from effvlm.hf.report import Report
from effvlm.hf.rows import Rows
from effvlm.hf.trace import Trace
from effvlm.tokens import Method, Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

_FILL = {"attention_mask": 0, "position_ids": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


class Reducer:
    """What :func:`reduce` returns: a context manager, and a function of inputs for those who want no magic.

    Attributes:
        report: a :class:`Report` over all images so far.
    """

    def __init__(self, model: Any, method: Method) -> None:
        if isinstance(method, type) or not isinstance(method, Method):
            raise TypeError(f"reduce: expected a method such as effvlm.tokens.ToMe(keep=0.25), got {method!r}")
        self.model = model
        self.recipe = method if isinstance(method, Recipe) else Recipe([method])
        self.report = Report()
        self._encoder = Encoder(model, self.recipe, self.report)
        self._undo = ExitStack()
        self._proportional = Proportional()
        self._sizes = torch.empty(0)  # (B, L): how many tokens each place of the last prompt stands for, 0 where it is gone
        self._kept: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()  # the same, by the cache that holds them

    def __enter__(self) -> Reducer:
        if "generate" in vars(self.model):
            raise RuntimeError("reduce: this model is already inside effvlm.reduce; leave that block first")
        with ExitStack() as undo:
            undo.callback(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
            if self._encoder.proportional:
                undo.enter_context(listening(language_attention(self.model), self._proportional))
            self.model.generate = self._generate
            undo.callback(delattr, self.model, "generate")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._undo.close()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's inputs with fewer visual tokens: give the result to ``model.generate(**…)`` outside the context.

        Args:
            inputs: what the processor returned: ``input_ids`` (B, L), ``attention_mask``, ``pixel_values``, …; ``position_ids``
                default to what ``generate`` would use. Inputs without images come back as they are.

        Raises:
            ValueError: no ``input_ids``, placeholders that do not match the images, or a recipe with proportional attention,
            which
                changes the model and so needs the block.
        """
        if self._encoder.proportional and "generate" not in vars(self.model):
            raise ValueError(
                "reduce: expected a with block for a recipe with attention='proportional'; inputs alone cannot say sizes"
            )
        return self._reduced(dict(inputs), positions_for_generate)

    def trace(self, image: Image, index: int = 0, crop: int | None = None) -> Image:
        """``image``, a picture of the last call, with the fate of its patches: see :meth:`effvlm.hf.trace.Trace.draw`.

        Raises:
            RuntimeError: there was no call yet.
            ValueError: no such image or crop.
        """
        found = self._encoder.traces.get("image") or self._encoder.traces.get("video")
        if not isinstance(found, Trace):
            raise RuntimeError("trace: expected a call with images before, got none yet")
        return found.draw(image, index, crop)

    def _reduced(self, inputs: dict[str, Any], positions: Any, known: torch.Tensor | None = None) -> dict[str, Any]:
        """``inputs`` reduced; ``positions`` (model, inputs, first new column) makes the position ids where there are none.

        ``known`` (B, L₁) are the sizes of the first L₁ columns, whose keys and values a cache already holds.
        """
        if not pixels_of(inputs) and known is None:
            return inputs
        if inputs.get("input_ids") is None:
            raise ValueError("reduce: expected input_ids beside the pixels, got none")
        ids = inputs["input_ids"]
        if inputs.get("attention_mask") is None:
            # Never without one: position ids with gaps and no mask would be taken for several packed sequences.
            inputs["attention_mask"] = torch.ones_like(ids)
        if self.recipe.positions == "renumbered":
            self._refuse_renumbering(inputs)
        elif inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(self.model, inputs, 0 if known is None else known.shape[1])
        sizes = torch.ones(ids.shape, device=ids.device)
        if known is not None:
            sizes[:, : known.shape[1]] = known.to(sizes.device)
        if pixels_of(inputs):
            new = ids if known is None else torch.cat([ids.new_full(known.shape, -1), ids[:, known.shape[1] :]], dim=1)
            inputs["mm_encoder_outputs"] = self._encoder(new, inputs, sizes)
        rows = Rows.keeping(sizes > 0, inputs["attention_mask"])
        pad = getattr(self.model.config, "pad_token_id", None)
        for name, value in {"input_ids": 0 if pad is None else pad, **_FILL}.items():
            if inputs.get(name) is not None:
                inputs[name] = rows.take(inputs[name].expand(*inputs[name].shape[:-2], *ids.shape), value)
        self._sizes = sizes
        self._proportional.begin(rows.take(sizes, 1) if self._encoder.proportional else None)
        return inputs

    def _refuse_renumbering(self, inputs: dict[str, Any]) -> None:
        if inputs.get("image_grid_thw") is not None or inputs.get("video_grid_thw") is not None:
            raise ValueError("reduce: positions='renumbered' has no meaning for models with three-dimensional positions")

    def _before_forward(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        inputs = {**named.arguments, **named.arguments.get("kwargs", {})}
        inputs.pop("kwargs", None)
        if not pixels_of(inputs):
            cache = inputs.get("past_key_values")
            if inputs.get("mm_encoder_outputs") is None and (cache is None or cache.get_seq_length() == 0):
                self._proportional.begin(None)  # a new text
            return args, kwargs
        with torch.no_grad():
            return (), self._reduced(inputs, positions_for_forward)

    def _generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` on reduced inputs; the returned sequences start with the whole prompt, as ever."""
        generate = type(self.model).generate
        if inputs is not None:
            kwargs["input_ids"] = inputs
        cache = kwargs.get("past_key_values")
        known = None if cache is None else self._kept.get(cache)
        if not pixels_of(kwargs) and known is None:
            self._proportional.begin(None)
            return generate(self.model, None, *args, **kwargs)
        self._check_generate(kwargs)
        prompt = kwargs["input_ids"]
        with torch.no_grad():
            reduced = self._reduced(dict(kwargs), positions_for_generate, known)
        gone = prompt.shape[1] - reduced["input_ids"].shape[1]
        for limit in ("max_length", "min_length"):  # they count the prompt
            if reduced.get(limit) is not None:
                reduced[limit] -= gone
        out = generate(self.model, None, *args, **reduced)
        is_tensor = isinstance(out, torch.Tensor)
        for cache in (kwargs.get("past_key_values"), None if is_tensor else out.get("past_key_values")):
            if cache is not None and self._encoder.expansion == 1:
                self._kept[cache] = self._sizes  # for the next turn
        if is_tensor:
            return _with_prompt(out, prompt, gone)
        out.sequences = _with_prompt(out.sequences, prompt, gone)
        return out

    def _check_generate(self, kwargs: dict[str, Any]) -> None:
        """Raise where ``generate`` would silently compute something else."""

        def option(name: str) -> Any:
            value = kwargs.get(name)
            for config in (kwargs.get("generation_config"), self.model.generation_config):
                value = getattr(config, name, None) if value is None else value
            return value

        if option("use_cache") is False:
            raise ValueError(
                "reduce: expected use_cache=True; without a cache, positions with gaps are taken for packed sequences"
            )
        self._encoder.expansion = max(option("num_beams") or 1, option("num_return_sequences") or 1)


def _with_prompt(sequences: torch.Tensor, prompt: torch.Tensor, gone: int) -> torch.Tensor:
    """(B·k, L − gone + new) → (B·k, L + new): the shortened prompt of every row replaced by its original."""
    rows = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    return torch.cat([rows, sequences[:, prompt.shape[1] - gone :]], dim=1)


def reduce(model: Any, method: Method) -> Reducer:
    """Run ``model`` with fewer visual tokens inside a ``with`` block; everything is undone on exit.

    ::

        with effvlm.reduce(model, effvlm.tokens.ToMe(keep=0.25)) as reducer:
            model.generate(**inputs)
        print(reducer.report)

    Works with ``generate()`` (greedy, sampling, beams, several turns, chunked prefill), batches with padding, several images per
    prompt, and plain ``model(**inputs)`` (whose logits then belong to the shorter sequence). Token positions stay the original
    ones. Without the block, ``reducer(inputs)`` returns inputs for ``generate``. One block per model at a time; a model shared by
    threads is reduced for all of them.

    Args:
        model: a Hugging Face image-text-to-text model of a supported family (``effvlm.hf.families.FAMILIES``).
        method: what to do with the tokens, see :mod:`effvlm.tokens`: a method, a step or a recipe.

    Returns:
        The :class:`Reducer`, whose ``report`` counts images and tokens and whose ``trace`` draws what became of them.

    Raises:
        TypeError: ``model`` is no such model, or ``method`` is none.
        ValueError: the family is not supported.
    """
    return Reducer(model, method)
