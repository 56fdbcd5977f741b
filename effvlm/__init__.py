"""effvlm: the vision-language model you have, smaller and faster on the machine you have."""

from importlib.metadata import version

from effvlm import demo, tokens
from effvlm._library import set_cpu_isa
from effvlm.hf import disable, enable, reduce
from effvlm.ops import TokenMatch, TokenMerge, moe_ffn, token_match, token_merge

__version__ = version("effvlm")

__all__ = [
    "TokenMatch",
    "TokenMerge",
    "__version__",
    "demo",
    "disable",
    "enable",
    "moe_ffn",
    "reduce",
    "set_cpu_isa",
    "token_match",
    "token_merge",
    "tokens",
]
