"""``model.set_use_kernels(True)`` and ``from_pretrained(use_kernels=True)`` with our scans on CPUs, for the ``kernels`` package.

transformers' own mapping has GPU kernels only. Where the package is there in a version that transformers takes, its functions are
layers without state that a repository object hands out; ours hands out a layer per function. Unlike :func:`effvlm.enable`, which
needs no package, that is for all models of a family in the process: it is how the package works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from effvlm.hf.scans import FUNCTIONS, instead_of


class Ours:
    """What ``kernels`` asks for the layer of one function; copies and comparisons are by name."""

    def __init__(self, name: str) -> None:
        self.layer_name = name

    def load(self) -> type[torch.nn.Module]:
        """A layer without constructor or members of its own, with the function's parameters, as ``kernels`` demands."""
        return type(self.layer_name, (torch.nn.Module,), {"forward": _forward(self.layer_name), "has_backward": True})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ours) and other.layer_name == self.layer_name

    def __hash__(self) -> int:
        return hash((Ours, self.layer_name))


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        theirs = partial(type(self).forward, self)  # the instance's forward is this one, its class's the function it stands for
        return instead_of(name, theirs)(*args, **kwargs)

    own = inspect.signature(FUNCTIONS[name])
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = own.replace(parameters=[me, *own.parameters.values()])  # type: ignore[attr-defined]
    return forward


def register_kernels() -> list[str]:
    """Tell the ``kernels`` package of our functions for tensors on the CPU.

    Returns:
        Their names.

    Raises:
        ImportError: there is no ``kernels``, or transformers does not take its version.
    """
    from transformers.integrations.hub_kernels import is_kernels_available

    if not is_kernels_available():
        raise ImportError(
            "register_kernels: expected the kernels package in a version that transformers takes; effvlm.enable needs none"
        )
    import kernels  # type: ignore[import-not-found, unused-ignore]

    names = [name for name in FUNCTIONS if FUNCTIONS[name] is not FUNCTIONS["mamba_inner_fn"]]
    modes = kernels.Mode.INFERENCE
    kernels.register_kernel_mapping({name: {"cpu": {modes: Ours(name)}} for name in names})
    return names
