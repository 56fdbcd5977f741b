"""Tiny random vision-language models of every supported family, and batches of inputs for them, made without processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

PAD, IMAGE, VIDEO, FIRST_WORD, VOCAB = 0, 5, 6, 10, 96
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
_SIGLIP = {**_CLIP, "vision_use_head": False}
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tiny:
    """One family: ``make`` builds the model, ``picture`` (model, image number) what one image adds to the inputs, and its
    tokens."""

    make: Callable[[], Any]
    picture: Callable[[Any, int], tuple[Inputs, int]]
    extra: Callable[[torch.Tensor], Inputs] = lambda ids: {}
    tensor: bool = False  # the model takes all images as one tensor


def _llama() -> Any:
    return tf.LlamaConfig(**_TEXT)


def _qwen2(**more: Any) -> Any:
    return tf.Qwen2Config(**_TEXT, **more)


def _square(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    side = model.config.vision_config.image_size
    tokens = {"gemma3": 9, "internvl": 9}.get(model.config.model_type, 36)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=g)}, tokens


def _llava() -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**_CLIP),
            text_config=_llama(),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            pad_token_id=PAD,
        )
    )


_PINPOINTS = [[24, 48], [48, 24], [48, 48]]
_SIZES = [(20, 44), (46, 40), (40, 22), (24, 24)]  # heights and widths of pictures


def _next() -> Any:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=_llama(),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        pad_token_id=PAD,
    )
    return tf.LlavaNextForConditionalGeneration(config)


def _onevision() -> Any:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_SIGLIP),
        text_config=_qwen2(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        pad_token_id=PAD,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _cropped(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    size = torch.tensor([_SIZES[number % len(_SIZES)]])
    pixels = torch.zeros(1, 5, 3, 24, 24)
    pixels += torch.randn(pixels.shape, generator=g)
    with torch.no_grad():
        n = len(model.get_image_features(pixel_values=pixels, image_sizes=size, return_dict=True).pooler_output[0])
    return {"pixel_values": pixels, "image_sizes": size}, n


def _mrope() -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def _qwen2_5() -> Any:
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 32,
    }
    config = tf.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_mrope()},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_parts() -> dict[str, Any]:
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return {
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }


def _qwen3() -> Any:
    text = {**_TEXT, **_mrope(), "head_dim": 8}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, **_qwen3_parts()))


def _qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    text = {**_TEXT, **_mrope(), **experts, "head_dim": 8}
    return tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text, **_qwen3_parts()))


_GRIDS = [(1, 8, 12), (1, 6, 8), (1, 12, 4), (1, 8, 8)]


def _native(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    t, h, w = _GRIDS[number % len(_GRIDS)]
    channels = 3 * model.base_model.visual.patch_embed.temporal_patch_size * 16
    pixels = torch.randn(t * h * w, channels, generator=g)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[t, h, w]])}, t * h * w // 4


def film(model: Any, frames: int = 6) -> tuple[Inputs, int]:
    """A video for the Qwen families and LLaVA-OneVision: (inputs, tokens)."""
    g = torch.Generator().manual_seed(7)
    if model.config.model_type == "llava_onevision":
        pixels = torch.randn(1, 1, 3, 24, 24, generator=g) + 0.3 * torch.randn(1, frames, 3, 24, 24, generator=g)
        return {"pixel_values_videos": pixels}, frames * 9 + 1
    channels = 3 * model.base_model.visual.patch_embed.temporal_patch_size * 16
    still = torch.randn(1, 48, channels, generator=g)
    pixels = (still + 0.3 * torch.randn(frames, 48, channels, generator=g)).flatten(0, 1)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, 6, 8]])}, frames * 12


def _types(ids: torch.Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _internvl() -> Any:
    vision = tf.InternVLVisionConfig(**{**_CLIP, "image_size": [24, 24], "patch_size": [4, 4]})
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=_qwen2(),
        image_token_id=IMAGE,
        image_seq_length=9,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return tf.InternVLForConditionalGeneration(config)


def _tiles(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    return {"pixel_values": torch.randn(3, 3, 24, 24, generator=g)}, 27


def _smolvlm() -> Any:
    vision = tf.SmolVLMVisionConfig(**_CLIP)
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(vision_config=vision, text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)
    )


def _idefics3() -> Any:
    vision = tf.Idefics3VisionConfig(**_CLIP)
    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(vision_config=vision, text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)
    )


def _stacked(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    return {"pixel_values": torch.randn(1, 3, 3, 24, 24, generator=g)}, 27


def _gemma3() -> Any:
    text = tf.Gemma3TextConfig(
        **_TEXT, head_dim=8, sliding_window=256, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    )
    config = tf.Gemma3Config(
        text_config=text, vision_config=tf.SiglipVisionConfig(**_SIGLIP), mm_tokens_per_image=9, image_token_id=IMAGE
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    text = tf.GemmaConfig(**_TEXT, head_dim=8)
    vision = tf.SiglipVisionConfig(**_SIGLIP, projection_dim=32)
    config = tf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32, pad_token_id=PAD
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def _gemma4() -> Any:
    text = tf.Gemma4TextConfig(
        **{**_TEXT, "num_hidden_layers": 4, "initializer_range": 0.1},
        head_dim=8,
        global_head_dim=8,
        sliding_window=256,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    vision = tf.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        patch_size=4,
        position_embedding_size=64,
        pooling_kernel_size=2,
    )
    return tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            text_config=text,
            vision_config=vision,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=9,
        )
    )


def _placed(model: Any, number: int) -> tuple[Inputs, int]:
    g = torch.Generator().manual_seed(number)
    h, w = [(8, 10), (6, 8), (10, 4), (8, 8)][number % 4]
    ids = torch.full((1, 80, 2), -1)
    index = torch.arange(h * w)
    ids[0, : h * w] = torch.stack([index % w, index // w], 1)
    pixels = torch.zeros(1, 80, 48)
    pixels[0, : h * w] = torch.randn(h * w, 48, generator=g)
    return {"pixel_values": pixels, "image_position_ids": ids}, h * w // 4


FAMILIES = {
    "llava": Tiny(_llava, _square),
    "llava_next": Tiny(_next, _cropped),
    "llava_onevision": Tiny(_onevision, _cropped),
    "qwen2_5_vl": Tiny(_qwen2_5, _native, _types),
    "qwen3_vl": Tiny(_qwen3, _native, _types),
    "qwen3_vl_moe": Tiny(_qwen3_moe, _native, _types),
    "internvl": Tiny(_internvl, _tiles, tensor=True),
    "smolvlm": Tiny(_smolvlm, _stacked),
    "idefics3": Tiny(_idefics3, _stacked),
    "gemma3": Tiny(_gemma3, _square, lambda ids: {"token_type_ids": (ids == IMAGE).long()}, tensor=True),
    "gemma4": Tiny(_gemma4, _placed, _types),
    "paligemma": Tiny(_paligemma, _square, lambda ids: {"token_type_ids": torch.zeros_like(ids)}, tensor=True),
}


def make(family: str) -> Any:
    """The family's model, always with the same weights, in float32."""
    torch.manual_seed(1)
    model = FAMILIES[family].make().eval()
    for p in model.parameters():
        if not bool(p.any()):  # so that parts which begin at zero take part
            torch.nn.init.normal_(p, std=0.1 if p.dim() == 1 else 0.02)
    return model


def batch(family: str, model: Any, rows: int, left: bool = True, words: int = 4) -> Inputs:
    """One image per row between words, a different number of words in each row."""
    tiny = FAMILIES[family]
    g = torch.Generator().manual_seed(3)
    texts, pictures = [], []
    for row in range(rows):
        picture, n = tiny.picture(model, row)
        pictures.append(picture)
        before, after = (torch.randint(FIRST_WORD, VOCAB, (k,), generator=g) for k in (2, words + 3 * row))
        texts.append(torch.cat([before, torch.full((n,), IMAGE), after]))
    return assemble(tiny, texts, pictures, left)


def assemble(tiny: Tiny, texts: list[torch.Tensor], pictures: list[Inputs], left: bool) -> Inputs:
    """Padded rows and everything that goes with them."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(length - len(text), None) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **tiny.extra(ids),
        **{k: torch.cat([p[k] for p in pictures]) for k in pictures[0]},
    }
