"""Another forward for one instance of a module, and back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

REPLACED = "{}: something else has replaced the forward of this instance"  # why not, of a class


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None] | None:
    """Give one instance another ``forward(self, …)``; its class and other instances keep theirs.

    Returns:
        What undoes it; None, with nothing done, where something else has replaced the forward of this instance.
    """
    # accelerate keeps the forward that its hooks call under this name, and has one of its own in the instance.
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"
    if place == "forward" and "forward" in vars(module):
        return None
    before = vars(module).get(place)
    setattr(module, place, MethodType(forward, module))
    return lambda: delattr(module, place) if before is None else setattr(module, place, before)
