"""The ops: one file each, named as in ``csrc/ops``."""

from effvlm.ops.moe_ffn import moe_ffn
from effvlm.ops.token_match import TokenMatch, token_match
from effvlm.ops.token_merge import TokenMerge, token_merge

__all__ = ["TokenMatch", "TokenMerge", "moe_ffn", "token_match", "token_merge"]
