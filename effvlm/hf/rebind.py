"""A method of a class, with other functions under the global names that it calls: for one instance, or for a subclass.

transformers' mixers call their scan functions by module-level names. Assigning to those names would change every model of the
family in this process; copying the method would freeze what upstream may mend. So we build the same method (the same code
object) again, over a copy of its module's globals in which those names mean our functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import CellType, FunctionType
from typing import Any

from effvlm.hf.scans import FUNCTIONS, instead_of

# Functions that a family defines for itself, without the decorator that tells their names.
_UNDECORATED = ("causal_conv1d_fn", "causal_conv1d_update")


def _decorated_with(value: Any) -> Mapping[str, Any]:
    """What ``use_kernel_func_from_hub_with_fallback`` knows of a function: ``func_name``, ``is_new_implementation``, …"""
    inner = getattr(value, "__wrapped__", None)
    return inspect.getclosurevars(value).nonlocals if isinstance(value, FunctionType) and inner is not None else {}


def scan_name(name: str, value: Any) -> str:
    """Under which of the known names transformers registers ``value``, a global called ``name``; empty when under none."""
    if not callable(value) or isinstance(value, type):
        return ""
    found = getattr(value, "kernel_layer_name", "")  # with the kernels package, functions are modules that know their name
    found = found or _decorated_with(value).get("func_name", "")
    if not found and name in _UNDECORATED and getattr(value, "__module__", "").startswith("transformers."):
        found = name
    return found if found in FUNCTIONS else ""


@cache
def scans_of(kind: Any) -> Mapping[str, str]:
    """The scan functions that a class's ``forward`` calls: global name → known name."""
    forward = inspect.unwrap(kind.forward) if isinstance(getattr(kind, "forward", None), FunctionType) else None
    if not isinstance(forward, FunctionType):
        return {}
    called = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return {name: known for name, value in called.items() if (known := scan_name(name, value))}


@cache
def forward_with_ours(kind: Any) -> Callable[..., Any]:
    """``kind.forward`` with our functions under the names in :func:`scans_of`."""
    inner = inspect.unwrap(kind.forward)
    ours = {}
    for name, known in scans_of(kind).items():
        theirs = inner.__globals__[name]
        ours[name] = instead_of(known, theirs, packaged=_decorated_with(theirs).get("is_new_implementation", False))
    # Without __name__, torch.compile looks names up here and not in the module that the copy is of.
    names = {key: value for key, value in inner.__globals__.items() if key != "__name__"} | ours
    return _again(kind.forward, names)


def _again(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The function over other globals; decorators (functions with ``__wrapped__``) are built again around it."""
    inner = getattr(function, "__wrapped__", None)
    scope, cells = names, function.__closure__
    if inner is not None:
        new = _again(inner, names)
        scope, cells = function.__globals__, tuple(CellType(new) if c.cell_contents is inner else c for c in cells or ())
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, function.__qualname__, function.__doc__
    if inner is not None:
        copy.__wrapped__ = new  # type: ignore[attr-defined]
    return copy
