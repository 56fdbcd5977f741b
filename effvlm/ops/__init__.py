"""The ops: one file each, named as in ``csrc/ops``."""

from effvlm.ops.grouped_linear import grouped_linear
from effvlm.ops.moe_ffn import moe_ffn
from effvlm.ops.moe_route import MoeRoute, moe_route
from effvlm.ops.ternary_matmul import ternary_matmul
from effvlm.ops.ternary_unpack import ternary_unpack
from effvlm.ops.ternary_weight import TernaryWeight, ternary_pack
from effvlm.ops.token_match import TokenMatch, token_match
from effvlm.ops.token_merge import TokenMerge, token_merge
from effvlm.ops.token_score import token_score

__all__ = [
    "MoeRoute",
    "TernaryWeight",
    "TokenMatch",
    "TokenMerge",
    "grouped_linear",
    "moe_ffn",
    "moe_route",
    "ternary_matmul",
    "ternary_pack",
    "ternary_unpack",
    "token_match",
    "token_merge",
    "token_score",
]
