"""What the experts of a model see of calibration data: inputs of one module after the other, each behind compressed ones.

Blocks of layers that are done do not run again: the last one's output is kept for every batch and given back in its place, while
those before it hand their input on. That takes one pass over the model in all, instead of one per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

CHECKED = 3  # modules whose inputs are also computed without skipping anything
_WRONG_INPUT = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


class _StopHereError(Exception):
    """The input that a run was for has been seen."""


@dataclass
class Call:
    """A module's arguments in one batch, and which of its tokens count: (T,) bool, or None for all."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor | None = None

    def counts(self, rows: int) -> torch.Tensor:
        """(rows,) bool, which rows of a product's input count: it has one per token, or one per choice of a token."""
        if self.mask is None or len(self.mask) == 0 or rows % len(self.mask):
            return torch.ones(rows, dtype=torch.bool)
        return self.mask.repeat_interleave(rows // len(self.mask))


@dataclass
class _Kept:
    """Of one batch and one list of blocks: the last output, whose it is, and what each block returns besides the state."""

    index: int = -1
    output: Any = None
    rest: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)

    def wrap(self, forward: Callable[..., Any], index: int, final: int) -> Callable[..., Any]:
        """A block's forward, which is the ``index``-th of ``final`` that will not change any more."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if index == self.index:
                return self.output
            if index < self.index:  # what it returns is not looked at, but for what comes with the state
                state, rest = args[0] if args else kwargs["hidden_states"], self.rest[index]
                return state if rest is None else (state, *rest)
            made = forward(*args, **kwargs)
            self.rest[index] = tuple(made[1:]) if isinstance(made, tuple) else None
            if index == final - 1:
                self.index, self.output = index, made
            return made

        return run


class Session:
    """A model and its calibration batches, in a ``with`` block.

    Args:
        model: its modules of experts are compressed one after the other between calls of :meth:`see`.
        batches: each a dict for ``model(**inputs)``.
        names: of these modules.

    Attributes:
        order: the names as the first batch runs them; those that it does not run come last.

    Raises:
        TypeError: batches are no dicts.
        ValueError: there are none, or the model does not take them.
    """

    def __init__(self, model: Any, batches: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
        self.model, self.batches = model, list(batches)
        for inputs in self.batches:
            if not isinstance(inputs, Mapping):
                raise TypeError(f"compress: expected calibration as dicts for model(**inputs), got {type(inputs).__name__}")
        if not self.batches:
            raise ValueError("compress: expected calibration inputs, got none")
        self.order = list(names)
        self._kept: list[dict[str, _Kept]] = [{} for _ in self.batches]
        self._done: list[str] = []
        self._skips, self._checked = True, 0
        self._undo = ExitStack()

    def __enter__(self) -> Session:
        for module in self.model.modules():
            self._undo.callback(setattr, module, "training", module.training)
        self.model.eval()
        for config in {id(c): c for c in (self.model.config, self.model.config.get_text_config())}.values():
            if getattr(config, "use_cache", False):
                config.use_cache = False
                self._undo.callback(setattr, config, "use_cache", True)
        ran: list[str] = []
        with ExitStack() as hooks:
            for name in self.order:
                module = self.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)).remove)
            self._forward(0)
        self.order = [*dict.fromkeys(ran), *(n for n in self.order if n not in ran)]
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def see(self, name: str) -> list[Call]:
        """The calls of a module in all batches, as the model is now; it is taken for done when the next one's are asked for."""
        calls: list[Call] = []
        for i, inputs in enumerate(self.batches):
            call = self._run(name, i, skip=self._skips)
            if i == 0 and self._skips and self._checked < CHECKED:
                self._checked += 1
                whole = self._run(name, i, skip=False)
                self._skips = _same(call, whole)  # not if something looks at more than the last block's output
                call = whole
            if call is not None:
                call.mask = _mask(inputs, call)
                calls.append(call)
        self.skip(name)
        return calls

    def skip(self, name: str) -> None:
        """A module is compressed already."""
        self._done.append(name)

    def _forward(self, batch: int) -> None:
        try:
            with torch.no_grad():
                self.model(**self.batches[batch])
        except _WRONG_INPUT as error:
            model = type(self.model).__name__
            raise ValueError(f"compress: expected calibration inputs that {model} takes; batch {batch} gave: {error}") from error

    def _run(self, name: str, batch: int, *, skip: bool) -> Call | None:
        seen: list[Call] = []

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Call(args, kwargs))
            raise _StopHereError

        with ExitStack() as undo:
            undo.callback(self.model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True).remove)
            if skip:
                undo.enter_context(self._skipping(name, self._kept[batch]))
            with suppress(_StopHereError):
                self._forward(batch)
        return seen[0] if seen else None

    @contextmanager
    def _skipping(self, name: str, kept: dict[str, _Kept]) -> Iterator[None]:
        """Blocks that are final run once."""
        with ExitStack() as undo:
            for path, final in self._final(name).items():
                blocks, state = self.model.get_submodule(path), kept.setdefault(path, _Kept())
                for i in range(final):
                    before = vars(blocks[i]).get("forward")
                    blocks[i].forward = state.wrap(blocks[i].forward, i, final)
                    undo.callback(_restore, blocks[i], before)
            yield

    def _final(self, name: str) -> dict[str, int]:
        """Path of each list of blocks → how many of its first blocks will not change any more, while a module is next."""
        todo = [n for n in self.order if n not in self._done]
        found: dict[str, int] = {}
        for done in self._done:
            place = _block(self.model, done)
            if place is not None:
                left = [b[1] for n in [name, *todo] if (b := _block(self.model, n)) is not None and b[0] == place[0]]
                found[place[0]] = min(left, default=len(self.model.get_submodule(place[0])))
        return found


def _restore(block: Any, before: Any) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


def _block(model: Any, name: str) -> tuple[str, int] | None:
    """(path of the outermost list of blocks around a module, number of its block)."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if isinstance(model.get_submodule(path), torch.nn.ModuleList):
            return path, int(parts[i])
    return None


def _same(one: Call | None, other: Call | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip([*one.args, *one.kwargs.values()], [*other.args, *other.kwargs.values()], strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _mask(inputs: Mapping[str, Any], call: Call) -> torch.Tensor | None:
    """(T,) bool of the tokens that are no padding, where a batch says so and the module sees these tokens."""
    mask = inputs.get("attention_mask")
    x = next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or x is None or x.numel() // x.shape[-1] != mask.numel():
        return None
    return mask.flatten().bool()
