"""llama4_block: a whole ``Llama4TextMoe`` (router, one expert of 16 per token, shared expert) under effvlm.enable. Only timed.

transformers computes every expert on every token, and so reads 201 MB of experts where one token needs 13.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from specs import Args, Case, Spec, Tensors

_SIZES = {"T": 0, "E": 16, "H": 1024, "I": 2048}
CASES = tuple(Case(f"t{T}", {**_SIZES, "T": T}, bench=True) for T in (1, 8, 128))


@cache
def _module(dtype: torch.dtype) -> Any:
    """The same bfloat16 values in every dtype."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(hidden_size=1024, intermediate_size=2048, num_local_experts=16, num_experts_per_tok=1)
    module = Llama4TextMoe(config).eval().bfloat16()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    return module.to(dtype)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    return (torch.randn(1, case.sizes["T"], case.sizes["H"], generator=generator).bfloat16().to(dtype),)


@torch.no_grad()
def run(x: torch.Tensor) -> Tensors:
    from effvlm.hf.own_experts import FAMILIES

    return (FAMILIES["Llama4TextMoe"].forward(_module(x.dtype), x)[0],)


@torch.no_grad()
def reference(x: torch.Tensor) -> Tensors:
    module = _module(x.dtype)
    return (type(module).forward(module, x)[0],)


def _experts(case: Case) -> float:
    """How many experts uniform routing touches, on average, and the shared one."""
    T, E = case.sizes["T"], case.sizes["E"]
    return 1 + E * (1 - (1 - 1 / E) ** T)


SPEC = Spec(
    op="llama4_block",
    cases=CASES,
    inputs=inputs,
    flops=lambda c: 4.0 * c.sizes["T"] * 3 * c.sizes["H"] * c.sizes["I"],
    bytes=lambda c, dtype: float(dtype.itemsize * _experts(c) * 3 * c.sizes["H"] * c.sizes["I"]),
    dtypes=(torch.float32, torch.bfloat16),
    run=run,
    reference=reference,
)
