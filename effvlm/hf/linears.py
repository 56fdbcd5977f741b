"""Plain linear layers at few tokens, through :func:`effvlm.grouped_linear` with one layer.

A step of decoding reads every weight once and does little with it, so that it can run at the speed of memory. On a CPU, torch's
product of a bfloat16 matrix with a vector gets about half of that, and its float16 and float32 products with a few vectors less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effvlm.hf.enable_report import EnableReport
from effvlm.hf.instances import REPLACED, replace_forward
from effvlm.ops.grouped_linear import grouped_linear

MOST_TOKENS = 8
LEAST_WEIGHTS = 2**16  # smaller layers take less time than a call of ours


def consider(name: str, module: Any, report: EnableReport, undo: list[Callable[[], None]]) -> None:
    """Put one module on our kernel if it is a linear layer on the CPU: said in ``report``, undone by ``undo``."""
    if type(module) is not torch.nn.Linear or not module.weight.is_cpu or module.weight.numel() < LEAST_WEIGHTS:
        return
    back = replace_forward(module, forward)
    if back is None:
        report.fallbacks[name] = REPLACED.format("Linear")
    else:
        undo.append(back)
        report.modules[name] = f"grouped_linear for up to {MOST_TOKENS} tokens"


def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    """``torch.nn.Linear.forward``: (…, C) → (…, O)."""
    if not _is_ours(input, self.weight, self.bias):
        return torch.nn.functional.linear(input, self.weight, self.bias)
    rows = input.reshape(-1, input.shape[-1])
    ids = torch.zeros(rows.shape[0], dtype=torch.int64)
    out = grouped_linear(rows, ids, self.weight[None], bias=None if self.bias is None else self.bias[None])
    return out.view(*input.shape[:-1], out.shape[-1])


def _is_ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tokens = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
    return (
        (tokens > 1 or (tokens == 1 and x.dtype == torch.bfloat16))
        and tokens <= MOST_TOKENS
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and (bias is None or bias.dtype == x.dtype)
        and x.shape[-1] == weight.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
