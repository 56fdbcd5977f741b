"""reduce(): exact where it must be, everything undone, ordinary generate() calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

import effvlm
from effvlm.tokens import Stride, ToMe

IMAGE, PAD, TOKENS = 5, 0, 16


@pytest.fixture(scope="module")
def model() -> Any:
    """LLaVA with a CLIP tower (class token dropped) and a Llama, random weights."""
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=1,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1, pad_token_id=PAD
    )
    built = AutoModelForImageTextToText.from_config(config).eval()
    for p in built.parameters():
        p.data.normal_(0, 0.15)
    return built


def prompts(rows: list[list[int]], left: bool = True) -> dict[str, torch.Tensor]:
    """Rows of token ids (IMAGE stands for a whole image) with a picture for each image, padded to one length."""
    full = [[t for token in row for t in ([IMAGE] * TOKENS if token == IMAGE else [token])] for row in rows]
    length = max(map(len, full))
    pads = [[PAD] * (length - len(row)) for row in full]
    ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, full, strict=True)])
    images = sum(row.count(IMAGE) for row in rows)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


ONE = [[7, IMAGE, 8, 9, 10]]
TWO = [[7, IMAGE, 8, 9, 10], [11, 12, 13, 14, IMAGE, 15]]


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **{"do_sample": False, **options})


def test_keeping_all_is_bit_identical(model: Any) -> None:
    inputs = prompts(TWO)
    with torch.no_grad():
        plain, logits = generate(model, inputs), model(**inputs).logits
        with effvlm.reduce(model, ToMe(keep=1.0)):
            assert torch.equal(generate(model, inputs), plain)
            assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("method", [ToMe(keep=0.5), ToMe(keep=0.2), Stride(keep=0.3)])
def test_equals_the_same_embeddings_by_hand(model: Any, method: Any) -> None:
    """The language model must see the reduced features at the original positions, and nothing else changed."""
    inputs = prompts(ONE)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        out = method(effvlm.tokens.Tokens.of(features[None]))
        embeds = model.get_input_embeddings()(inputs["input_ids"])[0]
        by_hand = torch.cat([embeds[:1], out.x[0], embeds[1 + TOKENS :]])[None]
        position = torch.cat([torch.tensor([0]), 1 + out.position[0], torch.arange(1 + TOKENS, embeds.shape[0])])[None]
        expected = model(inputs_embeds=by_hand, position_ids=position, attention_mask=torch.ones_like(position)).logits
        with effvlm.reduce(model, method) as reducer:
            got = model(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert (reducer.images, reducer.tokens_in, reducer.tokens_out) == (1, TOKENS, out.x.shape[1])


def test_positions_go_on_after_the_original_prompt(model: Any) -> None:
    """Greedy decoding by generate() equals feeding the growing text through plain forwards."""
    inputs, method = prompts(ONE), ToMe(keep=0.25)
    with effvlm.reduce(model, method):
        generated = generate(model, inputs)
        ids = inputs["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                step = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"])
            ids = torch.cat([ids, step.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_are_independent(model: Any, left: bool) -> None:
    batch = prompts(TWO, left)
    with effvlm.reduce(model, ToMe(keep=0.25)), torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(TWO):
            alone = prompts([row]) | {"pixel_values": batch["pixel_values"][i : i + 1]}
            single = model(
                **alone,
                position_ids=torch.arange(alone["input_ids"].shape[1])[None] + (2 - len(row) + 4 if left and i == 0 else 0),
            )
            width = single.logits.shape[1]
            ours = together[i, -width:] if left else together[i, :width]
            assert torch.allclose(ours, single.logits[0], atol=1e-4)
        if left:
            assert torch.equal(
                generate(model, batch)[1, -6:],
                generate(model, prompts([TWO[1]]) | {"pixel_values": batch["pixel_values"][1:]})[0, -6:],
            )


def test_several_and_no_images_in_a_row(model: Any) -> None:
    rows = [[7, IMAGE, 8, IMAGE, 9], [11, 12, 13], [14, IMAGE, 15]]
    inputs = prompts(rows)
    with effvlm.reduce(model, ToMe(keep=0.5)) as reducer:
        out = generate(model, inputs)
        one = generate(model, prompts([rows[2]]) | {"pixel_values": inputs["pixel_values"][2:]})
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(out[2, -6:], one[0, -6:])
    assert (reducer.images, reducer.tokens_in, reducer.tokens_out) == (4, 4 * TOKENS, 2 * TOKENS)


def test_generates_in_every_way(model: Any) -> None:
    inputs = prompts(TWO)
    length = inputs["input_ids"].shape[1]
    with effvlm.reduce(model, ToMe(keep=0.25)):
        greedy = generate(model, inputs)
        assert generate(model, inputs, num_beams=3, num_return_sequences=2).shape == (4, length + 6)
        assert torch.equal(generate(model, inputs, num_beams=3)[:, :length], inputs["input_ids"])
        assert generate(model, inputs, do_sample=True).shape == (2, length + 6)
        full = generate(model, inputs, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(full.sequences, greedy)
        assert len(full.scores) == 6
        named = {k: v for k, v in inputs.items() if k != "input_ids"}
        positional = model.generate(inputs["input_ids"], **named, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(positional, greedy)
        assert model.generate(**inputs, max_length=length + 3, do_sample=False).shape[1] <= length + 3
        text_only = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        assert generate(model, text_only).shape == (1, 9)


def test_everything_is_undone(model: Any) -> None:
    inputs = prompts(TWO)
    plain, state = generate(model, inputs), set(vars(model))

    def fail_inside() -> None:
        with effvlm.reduce(model, ToMe(keep=0.25)):
            generate(model, inputs)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert set(vars(model)) == state
    assert not model._forward_pre_hooks
    assert torch.equal(generate(model, inputs), plain)


def test_the_explicit_form_needs_no_context(model: Any) -> None:
    inputs = prompts(TWO)
    reducer = effvlm.reduce(model, ToMe(keep=0.25))
    with reducer:
        expected = generate(model, inputs)[:, -6:]
    assert torch.equal(generate(model, reducer.prepare(inputs))[:, -6:], expected)
    assert "pixel_values" in inputs


def test_refusals(model: Any) -> None:
    with pytest.raises(TypeError, match="Hugging Face image-text-to-text model"):
        effvlm.reduce(torch.nn.Linear(2, 2), ToMe())
    with pytest.raises(TypeError, match=r"ToMe\(keep=0.25\)"):
        effvlm.reduce(model, 0.25)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="already inside"), effvlm.reduce(model, ToMe()), effvlm.reduce(model, ToMe()):
        pass
    assert "generate" not in vars(model)
    inputs = prompts(ONE)
    inputs["input_ids"] = inputs["input_ids"][:, :-6]
    inputs["attention_mask"] = inputs["attention_mask"][:, :-6]
    with pytest.raises(ValueError, match="one image placeholder per visual token"), effvlm.reduce(model, ToMe()):
        model(**inputs)


def test_an_unknown_family_is_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="type llava, got 'llama'"):
        effvlm.reduce(llama, ToMe())
