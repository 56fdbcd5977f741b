"""Equal parameters of several modules as one tensor, which is what the kernels of experts want."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Stacked:
    """(E, …) copy of E parameters, packed when it is first wanted and again when one of them has changed.

    Args:
        parameters: of equal shape, dtype and device.
        free_original: make the parameters views of the copy, so that there is one of each. Their values, names and saving stay.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, free_original: bool = False) -> None:
        self._parameters = list(parameters)
        self._packed: torch.Tensor | None = None
        self._state: list[tuple[int, int]] = []
        if free_original:
            self._packed = torch.stack([p.detach() for p in self._parameters])
            for parameter, view in zip(self._parameters, self._packed, strict=True):
                parameter.data = view

    @property
    def bytes(self) -> int:
        """What the copy takes besides the parameters."""
        return 0 if self._shared() else sum(p.numel() * p.element_size() for p in self._parameters)

    def _shared(self) -> bool:
        packed = self._packed
        return packed is not None and all(p.data_ptr() == v.data_ptr() for p, v in zip(self._parameters, packed, strict=True))

    def tensor(self) -> torch.Tensor:
        """The copy, up to date."""
        if self._packed is not None and self._shared():
            return self._packed
        state = [(p.data_ptr(), p._version) for p in self._parameters]
        if self._packed is None or state != self._state:
            self._packed, self._state = torch.stack([p.detach() for p in self._parameters]), state
        return self._packed
