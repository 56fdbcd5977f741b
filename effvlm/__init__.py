"""effvlm: the vision-language model you have, smaller and faster on the machine you have."""

from importlib.metadata import version

from effvlm import convert, demo, experts, nn, ops, quant, tokens
from effvlm._library import set_cpu_isa
from effvlm.compression import compress
from effvlm.hf import disable, enable, reduce
from effvlm.hf.registration import register
from effvlm.ops import (
    MoeRoute,
    SelectiveScan,
    TernaryWeight,
    TokenMatch,
    TokenMerge,
    TokenSelect,
    bidirectional,
    causal_conv1d,
    chunk_scan,
    cross_scan,
    delta_update,
    grouped_linear,
    moe_ffn,
    moe_route,
    multi_scale_scan,
    selective_scan,
    state_update,
    ternary_matmul,
    ternary_pack,
    ternary_unpack,
    token_apply,
    token_diverse,
    token_match,
    token_merge,
    token_score,
    token_select,
    token_similarity,
)
from effvlm.quant import TernaryRecipe

__version__ = version("effvlm")
register()  # from_pretrained knows compressed models from here on

__all__ = [
    "MoeRoute",
    "SelectiveScan",
    "TernaryRecipe",
    "TernaryWeight",
    "TokenMatch",
    "TokenMerge",
    "TokenSelect",
    "__version__",
    "bidirectional",
    "causal_conv1d",
    "chunk_scan",
    "compress",
    "convert",
    "cross_scan",
    "delta_update",
    "demo",
    "disable",
    "enable",
    "experts",
    "grouped_linear",
    "moe_ffn",
    "moe_route",
    "multi_scale_scan",
    "nn",
    "ops",
    "quant",
    "reduce",
    "selective_scan",
    "set_cpu_isa",
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
    "tokens",
]
