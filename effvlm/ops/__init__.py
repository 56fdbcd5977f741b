"""The ops: one file each, named as in ``csrc/ops``."""

from effvlm.ops.causal_conv1d import causal_conv1d
from effvlm.ops.chunk_scan import ChunkScan, chunk_scan, discretize
from effvlm.ops.grouped_linear import grouped_linear
from effvlm.ops.moe_ffn import moe_ffn
from effvlm.ops.moe_route import MoeRoute, moe_route
from effvlm.ops.selective_scan import SelectiveScan, selective_scan
from effvlm.ops.state_update import delta_update, state_update
from effvlm.ops.ternary_matmul import ternary_matmul
from effvlm.ops.ternary_unpack import ternary_unpack
from effvlm.ops.ternary_weight import TernaryWeight, ternary_pack
from effvlm.ops.token_apply import token_apply
from effvlm.ops.token_diverse import token_diverse
from effvlm.ops.token_match import TokenMatch, token_match
from effvlm.ops.token_merge import TokenMerge, token_merge
from effvlm.ops.token_score import token_score
from effvlm.ops.token_select import TokenSelect, token_select
from effvlm.ops.token_similarity import token_similarity
from effvlm.ops.traversals import bidirectional, cross_scan, multi_scale_scan

__all__ = [
    "ChunkScan",
    "MoeRoute",
    "SelectiveScan",
    "TernaryWeight",
    "TokenMatch",
    "TokenMerge",
    "TokenSelect",
    "bidirectional",
    "causal_conv1d",
    "chunk_scan",
    "cross_scan",
    "delta_update",
    "discretize",
    "grouped_linear",
    "moe_ffn",
    "moe_route",
    "multi_scale_scan",
    "selective_scan",
    "state_update",
    "ternary_matmul",
    "ternary_pack",
    "ternary_unpack",
    "token_apply",
    "token_diverse",
    "token_match",
    "token_merge",
    "token_score",
    "token_select",
    "token_similarity",
]
