"""Tiny random models with routed experts, one of each way to store them, and what runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_TEXT = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 96}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_TEXT, **sizes))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_TEXT, intermediate_size=80, num_local_experts=4, num_experts_per_tok=2))


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"head_dim": 16, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return GptOssForCausalLM(GptOssConfig(**_TEXT, **sizes, layer_types=types))


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        "intermediate_size": 96, "moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16,
    }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(_TEXT | {"num_key_value_heads": 4}), **sizes))


def _switch() -> Any:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 4, "num_heads": 4, "num_experts": 4, "expert_capacity": 32}
    more = {"vocab_size": 64, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_decoder_layers": 4}
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, **more, decoder_start_token_id=0, router_jitter_noise=0.0)
    )


def _llava() -> Any:
    from transformers import GraniteMoeHybridConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    text = GraniteMoeHybridConfig(
        **_TEXT, intermediate_size=48, shared_intermediate_size=32, layer_types=["attention"] * 3, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, vision_feature_select_strategy="full",
                    vision_feature_layer=-1)
    )  # fmt: skip


def _qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = _TEXT | {
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
    )


def _llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"head_dim": 16, "intermediate_size": 48, "intermediate_size_mlp": 64, "num_local_experts": 4, "moe_layers": [0, 2]}
    return Llama4ForCausalLM(Llama4TextConfig(**_TEXT, **sizes, num_experts_per_tok=1, attn_temperature_tuning=False))


def _dbrx() -> Any:
    from transformers import DbrxConfig, DbrxForCausalLM

    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    ffn = {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    return DbrxForCausalLM(
        DbrxConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=64, attn_config=attention, ffn_config=ffn)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "switch": _switch,
    "llava": _llava,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "llama4": _llama4,
    "dbrx": _dbrx,
}


def make(name: str) -> Any:
    """The model, with weights large enough for its experts to matter; the same every time."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    model.generation_config.pad_token_id = 0
    return model.eval()


def inputs_of(name: str, seed: int = 0, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Tokens for ``model(**inputs)``; with an image for LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 62, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "switch":
        given["decoder_input_ids"] = torch.randint(1, 62, (batch, length), generator=generator)
    if name == "llava":
        ids[:, :4] = 63
        given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    return given
