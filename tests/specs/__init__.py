"""Specs: what tests and bench know of an op. One module per op in this folder; :func:`specs` finds them by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from effvlm._library import OPS

Args = tuple[Any, ...]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One set of sizes, named after the model it comes from or the edge it tests."""

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "gauss"  # a key of DATA
    bench: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(str(v) for v in self.sizes.values())}-{self.data}"


@dataclass(frozen=True)
class Bad:
    """Arguments that the op must refuse: ``change`` turns good ones (of the spec's first case) into bad ones."""

    label: str
    change: Callable[[list[Any]], None]
    error: type[Exception]
    text: str


@dataclass(frozen=True)
class Spec:
    """What an op is checked and timed with. Arguments are those of its schema, in order.

    Attributes:
        inputs: (case, dtype, generator) → arguments, on the CPU.
        tolerance: per output, ``"exact"``, ``"one_rounding"`` or ``"reduction"`` (tests/tolerance.py).
        flops, bytes: of one call, as the op's header states them; bytes are those that must move.
        compare: replaces the comparison by tolerance: (arguments, got, oracle, same-dtype reference) → raises.
        peers: other ways to get the same, for bench: name → function of the arguments.
        prepared: peers that get ready first, outside the timing: name → function of the arguments that returns what to time, or
            raises ValueError with the sentence that its row shows instead.
        streamed: arguments that the reference converts to the dtype of the first piece by piece, because they are gigabytes.
        slow_reference: tests leave out all benchmarks, because the reference is no match for their sizes.
        opaque: arguments whose bytes are a format of their own: contiguous, and nothing that strides could mean.
        run: what to call; default the op itself. Specs with a ``run`` are chains of ops: timed, not conformance-tested.
    """

    op: str
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.dtype, torch.Generator], Args]
    flops: Callable[[Case], float]
    bytes: Callable[[Case, torch.dtype], float]
    tolerance: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    compare: Callable[[Args, Tensors, Tensors, Tensors], None] | None = None
    bad: tuple[Bad, ...] = ()
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    prepared: Mapping[str, Callable[..., Callable[[], Any]]] = field(default_factory=dict)
    streamed: tuple[int, ...] = ()
    opaque: tuple[int, ...] = ()
    slow_reference: bool = False
    run: Callable[..., Tensors] | None = None
    reference: Callable[..., Tensors] | None = None

    def tested(self) -> tuple[Case, ...]:
        """The cases that tests run: all but the benchmarks that take long."""
        small = [c for c in self.cases if self.flops(c) < 1e9 and self.bytes(c, torch.float32) < 1e8 and not self.slow_reference]
        return tuple(c for c in self.cases if not c.bench or c in small)

    def call(self, *args: Any) -> Tensors:
        """The compiled thing: its outputs, then what it wrote in place; the arguments themselves stay as they were."""
        if self.run:
            return self.run(*args)
        args = self.fresh(args)
        outputs = getattr(torch.ops.effvlm, self.op)(*args)
        return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *self.written(args))

    def timed(self, *args: Any) -> Tensors:
        """What users call, in place where the op writes in place."""
        op: Callable[..., Tensors] = self.run or importlib.import_module(f"effvlm.ops.{self.op}")._op
        return op(*args)

    def fresh(self, args: Args) -> Args:
        """The arguments, with copies (of the same strides) in place of those that the op writes to."""
        return tuple(_copy(a) if i in OPS[self.op].mutates and a is not None else a for i, a in enumerate(args))

    def written(self, args: Args) -> Tensors:
        """Those of the arguments that the op writes to."""
        return tuple(args[i] for i in OPS[self.op].mutates if args[i] is not None)

    def refer(self, *args: Any) -> Tensors:
        """The same in plain PyTorch."""
        return (self.reference or OPS[self.op].reference)(*args)

    def oracle(self, *args: Any) -> Tensors:
        """The reference on float64 copies of all floating-point arguments."""

        def wide(i: int, a: Any) -> Any:
            return a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in self.streamed else a

        return self.refer(*(wide(i, a) for i, a in enumerate(args)))


def _copy(x: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=x.device)
    whole.copy_(torch.as_strided(x, whole.shape, (1,), 0))
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


@cache
def specs() -> tuple[Spec, ...]:
    """Every spec in this folder, by name."""
    import effvlm.ops  # noqa: F401  (registers the ops)

    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"specs.{name}").SPEC for name in names if name != "data")
