"""effvlm: the vision-language model you have, smaller and faster on the machine you have."""

from importlib.metadata import version

from effvlm import demo, experts, tokens
from effvlm._library import set_cpu_isa
from effvlm.hf import disable, enable, reduce
from effvlm.ops import MoeRoute, TokenMatch, TokenMerge, grouped_linear, moe_ffn, moe_route, token_match, token_merge

__version__ = version("effvlm")

__all__ = [
    "MoeRoute",
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
    "reduce",
    "set_cpu_isa",
    "token_match",
    "token_merge",
    "tokens",
]
