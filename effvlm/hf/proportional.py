"""Proportional attention in the language model: a token that stands for s tokens counts s times.

ToMe (arXiv 2210.09461, §3) has it between merged tokens of a vision tower; here it is for what the language model sees of them.
softmax(q·k + log s) is what attention over s copies of a token gives, so that what a model adds up or counts keeps its measure.
"""

from __future__ import annotations

from typing import Any

import torch


class Proportional:
    """Tells the attention of a language model the sizes of the tokens that its cache holds."""

    hears = False

    def __init__(self) -> None:
        self._log: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def begin(self, sizes: torch.Tensor | None) -> None:
        """A new prompt, whose tokens have ``sizes`` (B, L); None: all are single."""
        self._log = None if sizes is None else sizes.clamp_min(1e-6).log()
        self._bias = None

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """(B·k, 1, 1, S): log sizes of the first keys, 0 for those that came later; for k sequences of each row."""
        if self._log is None:
            return None
        B, S = len(key), key.shape[2]
        if self._bias is None or self._bias.shape[0] != B or self._bias.shape[3] != S or self._bias.device != key.device:
            log = self._log.to(key.device).repeat_interleave(B // len(self._log), dim=0)[:, :S]
            self._bias = torch.nn.functional.pad(log, (0, S - log.shape[1]))[:, None, None]
        return self._bias

    def heard(self, *args: Any, **more: Any) -> None:
        """Nothing is recorded."""
