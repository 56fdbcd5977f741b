"""The one place that knows ``torch.library``, streams, devices, thread counts and how a tensor becomes a View.

An op file (``effvlm/ops/<op>.py``) states four things: its schema, ``check``, ``allocate`` and ``reference``.
:func:`register` turns them into ``torch.ops.effvlm.<op>``: the same ``check`` and ``allocate`` serve real and fake tensors,
and the compiled kernel gets ``(arguments in schema order, outputs, workspace, place)``.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

try:
    from effvlm import _core
except ImportError as error:
    raise ImportError(
        "effvlm: its compiled module could not be imported. Install the package (pip install .), and do not start Python in the "
        f"source folder, which hides the installed package. ({error})"
    ) from error

_LIBRARY = torch.library.Library("effvlm", "DEF")
_DTYPE_CODE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.bool: 7,
    torch.float64: 8,
    torch.uint32: 9,
}

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One registered op: what tests and bench need to know of it besides its spec.

    Attributes:
        mutates: positions of the arguments that the op writes to. Its reference leaves them alone and returns their new values
            after its outputs.
        needs_workspace: whether the compiled module has a ``<op>_workspace``.
    """

    name: str
    check: Callable[..., None]
    allocate: Callable[..., Tensors]
    reference: Callable[..., Tensors]
    mutates: tuple[int, ...] = ()
    needs_workspace: bool = True


OPS: dict[str, Op] = {}
_backend = os.environ.get("EFFVLM_BACKEND", "compiled")
_host_core: ModuleType | None = None  # test-only module that runs the CUDA sources on host tensors
_said: set[str] = set()

if _backend not in ("compiled", "reference"):
    raise ValueError(f"EFFVLM_BACKEND: expected 'compiled' or 'reference', got {_backend!r}")
DEBUG = os.environ.get("EFFVLM_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def backend(name: str, host_core: ModuleType | None = None) -> Iterator[None]:
    """Run ops by ``"compiled"`` kernels or by their PyTorch ``"reference"`` inside the block (for tests and debugging).

    Args:
        name: ``"compiled"`` or ``"reference"``.
        host_core: a module with the signatures of ``effvlm._core`` that gets host tensors in its place.
    """
    global _backend, _host_core
    if name not in ("compiled", "reference"):
        raise ValueError(f"backend: expected 'compiled' or 'reference', got {name!r}")
    before, _backend, _host_core = (_backend, _host_core), name, host_core
    try:
        yield
    finally:
        _backend, _host_core = before


def set_cpu_isa(name: str | None) -> None:
    """Force the CPU kernels to one ISA level, in this process, now.

    Args:
        name: ``"scalar"``, ``"avx2"``, ``"avx512"``, ``"avx512_vnni"``, ``"avx512_bf16"``, ``"amx"``, or ``None`` for the best
            level that the machine supports (or the one ``EFFVLM_CPU_ISA`` names).

    Raises:
        ValueError: the level is unknown, or this machine does not support it.
    """
    _core.set_cpu_isa(name)


def say_once(key: str, text: str) -> None:
    """Warn once per process: the same fact twice is noise."""
    if key not in _said:
        _said.add(key)
        warnings.warn(text, stacklevel=3)


def views(args: Sequence[Any]) -> list[Any]:
    """The arguments, with (address, shape, strides, dtype code, device or −1 for the CPU) in place of each tensor."""
    return _described(args)[0]


def _described(args: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """The arguments as :func:`views`, and what a check may go by: all but addresses and values, hashable."""
    given, kinds = _core.describe(args, torch.Tensor, _DTYPE_CODE)
    return given, kinds


def _place(device: torch.device) -> tuple[int, int, int]:
    """(device index or -1, stream handle, CPU threads)."""
    if device.type == "cuda":
        return (device.index, torch.cuda.current_stream(device).cuda_stream, 0)
    return (-1, 0, torch.get_num_threads())


def _run(op: Op, *args: Any) -> Tensors:
    given, kinds = _described(args)
    _check(op, args, kinds)
    if _backend == "reference":
        return _refer(op, args)
    outputs = op.allocate(*args)
    device = outputs[0].device
    core = _host_core if _host_core is not None and device.type == "cpu" else _core
    if device.type == "cuda" and not _core.cuda_version:
        raise RuntimeError(
            f"{op.name}: got tensors on {device}, but this effvlm was built without CUDA; "
            "reinstall it with nvcc on PATH (EFFVLM_CUDA=ON), or run with EFFVLM_BACKEND=reference"
        )
    place = _place(device)
    scratch: Tensors = ()
    if op.needs_workspace:
        size = getattr(core, f"{op.name}_workspace")(*given, place)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        scratch = (workspace,)
    getattr(core, op.name)(*given, *views(outputs + scratch), place)
    for i in op.mutates:
        if args[i] is not None:
            torch.autograd.graph.increment_version(args[i])  # for autograd, which may have saved what was there
    return outputs


_passed: set[tuple[Any, ...]] = set()
_MOST_PASSED = 4096  # kinds of calls that are remembered


def _check(op: Op, args: Sequence[Any], kinds: tuple[Any, ...]) -> None:
    """``op.check``, unless it has passed for tensors of these shapes, strides, dtypes and devices and for these numbers."""
    key = (op.name, kinds)
    try:
        if key in _passed and not DEBUG:
            return
    except TypeError:  # something unhashable, which no op takes
        return op.check(*args)
    op.check(*args)
    if len(_passed) == _MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def _refer(op: Op, args: Sequence[Any]) -> Tensors:
    """The reference, its new values written to the arguments that the op mutates."""
    outputs = op.reference(*args)
    if op.mutates:
        there = [i for i in op.mutates if args[i] is not None]
        for i, new in zip(there, outputs[len(outputs) - len(there) :], strict=True):
            args[i].copy_(new)
        outputs = outputs[: len(outputs) - len(there)]
    return outputs


def call_host(name: str, *args: Any) -> Any:
    """``effvlm._core.<name>(*args, threads)`` on host tensors: what is not an op, because its results' sizes depend on values."""
    return getattr(_core, name)(*views(args), torch.get_num_threads())


def register(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    allocate: Callable[..., Tensors],
    reference: Callable[..., Tensors],
    differentiable: Callable[..., Tensors] | None = None,
    needs_workspace: bool = True,
    check_values: Callable[..., None] | None = None,
) -> Callable[..., Tensors]:
    """Define ``torch.ops.effvlm.<name>`` and return the function that calls it.

    Args:
        name: the op's identifier, the same at every layer.
        schema: arguments and returns as ``torch.library`` writes them, for instance ``"(Tensor x, int r) -> (Tensor, Tensor)"``;
            ``Tensor(a!) state`` is written in place.
        check: raises ``ValueError`` or ``TypeError`` on arguments the op does not take; called for fake and real tensors. It
            goes by shapes, strides, dtypes, devices and plain arguments, and what has passed is not asked again (but with
            EFFVLM_DEBUG, where it may look at values).
        allocate: makes the (empty) outputs; called for fake and real tensors.
        reference: the op in plain PyTorch, obviously right; also what gives the gradients. Of an op that writes in place it
            returns the new values (of the arguments that are not None) after the outputs.
        differentiable: with grad mode on, the kernel still runs forward, and backward goes through this, computed again:
            ``reference``, or the same in a form that is faster to differentiate.
        needs_workspace: whether the compiled module has a ``<name>_workspace``; without, the kernel gets none.

    Returns:
        The op. With grad mode on and an input that requires grad, an op that is not ``differentiable`` runs ``reference`` (and
        says so once), because the compiled kernels are forward only.
    """
    op = OPS[name] = Op(name, check, allocate, reference, _mutated(schema), needs_workspace)

    overload = _define(op, schema, differentiable)

    def call(*args: Any) -> Tensors:
        grad = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        if grad and not differentiable:
            if not torch.compiler.is_compiling():
                say_once(name, f"effvlm.{name}: an input requires grad; the PyTorch reference runs, for its backward")
            check(*args)
            return _refer(op, args)
        if not grad and _is_eager(args):  # the dispatcher would come to the same, some microseconds later
            return _run(op, *args)
        outputs = overload(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list}


def _is_eager(args: Sequence[Any]) -> bool:
    """Whether nobody but the kernel wants to see this call: no tracing, no mode, no tangents, no subclass of tensors."""
    if not isinstance(args[0], torch.Tensor):
        return True  # for the sentence that check has, instead of torch's on schemas
    if (
        torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or args[0].is_meta
    ):
        return False
    return all(map(_PLAIN.__contains__, map(type, args)))


def _define(op: Op, schema: str, differentiable: Callable[..., Tensors] | None) -> Any:
    """``torch.ops.effvlm.<op>`` with its kernels, fake form and gradients."""

    def one_or_all(outputs: Tensors) -> Any:  # what torch.library wants of "-> Tensor" and of "-> (Tensor, Tensor)"
        return outputs if len(outputs) > 1 else outputs[0]

    def kernel(*args: Any) -> Any:
        return one_or_all(_run(op, *args))

    def fake(*args: Any) -> Any:
        op.check(*args)
        return one_or_all(op.allocate(*args))

    _LIBRARY.define(f"{op.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, kernel, "CPU")
    _LIBRARY.impl(op.name, kernel, "CUDA")
    torch.library.register_fake(f"effvlm::{op.name}", fake, lib=_LIBRARY)
    if differentiable:
        torch.library.register_autograd(f"effvlm::{op.name}", _backward(differentiable), setup_context=_save, lib=_LIBRARY)
    return getattr(torch.ops.effvlm, op.name).default


def _mutated(schema: str) -> tuple[int, ...]:
    """Positions of the arguments that a schema marks as written to."""
    return tuple(i for i, argument in enumerate(schema.split("->")[0].split(",")) if "!" in argument)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [isinstance(a, torch.Tensor) for a in inputs]
    ctx.save_for_backward(*(a for a, is_tensor in zip(inputs, tensors, strict=True) if is_tensor))
    ctx.rest = [None if is_tensor else a for a, is_tensor in zip(inputs, tensors, strict=True)]
    ctx.places = [i for i, is_tensor in enumerate(tensors) if is_tensor]


def _backward(form: Callable[..., Tensors]) -> Callable[..., Any]:
    """Gradients of an op through PyTorch, computed again: nothing of the forward is kept but its arguments."""

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        args, wanted = list(ctx.rest), []
        with torch.enable_grad():
            for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
                args[i] = x.detach().requires_grad_(ctx.needs_input_grad[i])
                wanted += [i] if ctx.needs_input_grad[i] else []
            outputs = form(*args)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad and g is not None]
        found: list[torch.Tensor | None] = [None] * len(args)
        if pairs:
            inputs = [args[i] for i in wanted]
            got = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
            for i, g in zip(wanted, got, strict=True):
                found[i] = g
        return tuple(found)

    return backward


def require_tensor(op: str, name: str, x: object, *, dims: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``x`` is a tensor of ``len(dims)`` dimensions (named by letters, e.g. ``"BNC"``) and one of ``dtypes``."""
    shape = "(" + ", ".join(dims) + ")"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor of shape {shape}, got {type(x).__name__}")
    if x.dim() != len(dims):
        raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: expected {name} of dtype {names}, got {str(x.dtype).removeprefix('torch.')}")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise TypeError(f"{op}: expected {name} on cpu or cuda, got {x.device}")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
