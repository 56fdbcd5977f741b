"""Tiny random models of every family with Mamba-like mixers in the installed transformers, found by looking."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from effvlm.hf.mixers import mixers_of

_SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8,
    "time_step_rank": 4, "mamba_dt_rank": 4, "n_groups": 2, "mamba_n_groups": 2, "mamba_ngroups": 2, "num_heads": 4,
    "mamba_num_heads": 4, "mamba_n_heads": 4, "n_mamba_heads": 2, "mamba_d_head": 32, "mamba_head_dim": 32, "mamba_headdim":
    32, "mamba_d_ssm": 128, "chunk_size": 16, "mamba_chunk_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads":
    2, "linear_num_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_head_dim": 16, "num_experts":
    4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 48,
    "n_shared_experts": 1, "attention_head_dim": 32, "attention_hidden_size": 128, "mamba_expand": 2, "expand": 2,
    "adapter_rank": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim":
    16, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What the sizes above do not say: which layers are mixers, and what must fit together.
_LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_CONVS = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
_MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR | _DENSE_FIRST | {"num_key_value_heads": 4},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [2]},
    "falcon_h1": {"num_hidden_layers": 3},
    "falcon_mamba": {"num_hidden_layers": 3},
    "glm5_next": _LINEAR | _DENSE_FIRST | {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": _LINEAR,
    "inkling": {
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["sparse"] * 3,
    },
    "inkling2": {"num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": _LINEAR | _DENSE_FIRST | {"num_key_value_heads": 4},
    "lfm2": _CONVS,
    "lfm2_moe": _CONVS | {"num_dense_layers": 1},
    "lfm3": _CONVS,
    "mamba": {"num_hidden_layers": 3},
    "mamba2": {"num_hidden_layers": 3, "num_heads": 4, "head_dim": 32},
    "olmo_hybrid": _LINEAR | {"num_key_value_heads": 4, "linear_num_key_heads": 4},
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": _LINEAR
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 4},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
    },
}


@cache
def families() -> tuple[str, ...]:
    """Model types one of whose modeling files calls a scan."""
    folder = Path(transformers.__file__).parent / "models"
    found = []
    for file in sorted(folder.glob("*/modeling_*.py")):
        text = file.read_text()
        if "use_kernel_func_from_hub_with_fallback" in text or "def causal_conv1d_fn" in text:
            found += [file.parent.name] if mixers_of(file.parent.name) else []
    return tuple(found)


def tiny(model_type: str, **more: Any) -> Any:
    """A causal language model with random parameters, in evaluation mode."""
    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    named = {
        n: c for n, c in vars(modeling).items() if n.endswith(("ForCausalLM", "TextModel")) and c.__module__ == modeling.__name__
    }
    kind = min(named.items(), key=lambda pair: not pair[0].endswith("ForCausalLM"))[1]
    sizes = {k: v for k, v in _SIZES.items() if hasattr(kind.config_class(), k)}
    torch.manual_seed(0)
    return kind(kind.config_class(**(sizes | _MORE.get(model_type, {}) | more))).eval()
