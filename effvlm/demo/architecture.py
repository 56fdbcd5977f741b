"""The demo VLM's shape: stock transformers classes, one tiny model that exercises every kernel family."""

from __future__ import annotations

from typing import Any

from effvlm.demo.questions import vocabulary
from effvlm.demo.scenes import SIZE

PAD, UNKNOWN, END, ANSWER, IMAGE = "<pad>", "<unk>", "</s>", "<answer>", "<image>"
SPECIAL = (PAD, UNKNOWN, END, ANSWER, IMAGE)
PATCH = 8
VISUAL_TOKENS = (SIZE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% else %}"
    "{% if message['content'] is string %}{{ '<answer> ' + message['content'] + ' </s> ' }}{% else %}"
    "{{ '<answer> ' + message['content'][0]['text'] + ' </s> ' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def make_processor() -> Any:
    """A ``LlavaProcessor``: SigLIP image processor at 96 px, word-level tokenizer, padding on the left."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[ANSWER, IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    pictures = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def _vision_config() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def _text_config(ids: dict[str, int]) -> Any:
    from transformers import GraniteMoeHybridConfig

    words = len(SPECIAL) + len(vocabulary())
    return GraniteMoeHybridConfig(
        vocab_size=-(-words // 16) * 16,
        hidden_size=128,
        intermediate_size=64,
        shared_intermediate_size=128,
        num_hidden_layers=6,
        layer_types=["mamba", "attention"] * 3,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_multiplier=32**-0.5,
        num_local_experts=16,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_chunk_size=64,
        initializer_range=0.08,  # about 1/√hidden_size; with the usual 0.02 the first 500 steps go by with little learnt
        position_embedding_type="nope",  # what is looked for is found by what it is; the Mamba layers know the order of words
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[END],
        eos_token_id=ids[END],
    )


def make_config() -> Any:
    """LLaVA: SigLIP tower (4 × 128), GraniteMoeHybrid text model (Mamba-2 and attention layers, 16 experts, 2 at a time)."""
    from transformers import LlavaConfig

    ids = {token: i for i, token in enumerate(SPECIAL)}
    return LlavaConfig(
        vision_config=_vision_config(),
        text_config=_text_config(ids),
        image_token_index=ids[IMAGE],
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        eos_token_id=ids[END],
    )
