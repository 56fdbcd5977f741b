"""effvlm: the vision-language model you have, smaller and faster on the machine you have."""

from importlib.metadata import version

from effvlm import demo, experts, ops, tokens
from effvlm._library import set_cpu_isa
from effvlm.hf import disable, enable, reduce
from effvlm.ops import (
    MoeRoute,
    TernaryWeight,
    TokenMatch,
    TokenMerge,
    grouped_linear,
    moe_ffn,
    moe_route,
    ternary_matmul,
    ternary_pack,
    ternary_unpack,
    token_match,
    token_merge,
)

__version__ = version("effvlm")

__all__ = [
    "MoeRoute",
    "TernaryWeight",
    "TokenMatch",
    "TokenMerge",
    "__version__",
    "demo",
    "disable",
    "enable",
    "experts",
    "grouped_linear",
    "moe_ffn",
    "moe_route",
    "ops",
    "reduce",
    "set_cpu_isa",
    "ternary_matmul",
    "ternary_pack",
    "ternary_unpack",
    "token_match",
    "token_merge",
    "tokens",
]
