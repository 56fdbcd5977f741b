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


def _counts(reducer: Any) -> tuple[int, int, int]:
    return reducer.report.images, reducer.report.tokens_in, reducer.report.tokens_out


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
        out = effvlm.tokens.apply(method, effvlm.tokens.Tokens.of([features]))
        embeds = model.get_input_embeddings()(inputs["input_ids"])[0]
        by_hand = torch.cat([embeds[:1], out.x, embeds[1 + TOKENS :]])[None]
        position = torch.cat([torch.tensor([0]), 1 + out.position, torch.arange(1 + TOKENS, embeds.shape[0])])[None]
        expected = model(inputs_embeds=by_hand, position_ids=position, attention_mask=torch.ones_like(position)).logits
        with effvlm.reduce(model, method) as reducer:
            got = model(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert _counts(reducer) == (1, TOKENS, len(out))


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
    assert _counts(reducer) == (4, 4 * TOKENS, 2 * TOKENS)


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
    assert torch.equal(generate(model, reducer(inputs))[:, -6:], expected)
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
    with pytest.raises(ValueError, match=r"llava, .*, got 'llama'"):
        effvlm.reduce(llama, ToMe())
    llama.config.model_type = "mllama"
    with pytest.raises(ValueError, match="cross-attention states"):
        effvlm.reduce(llama, ToMe())


def _state_of_classes() -> str:
    """Every attribute of every class and function table of the transformers modules that a reduced model uses."""
    import sys

    from transformers import AttentionInterface, AttentionMaskInterface

    lines = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith(
            ("transformers.models.llava", "transformers.models.clip", "transformers.models.llama", "transformers.generation")
        ):
            for key, value in sorted(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    lines += [f"{name}.{key}.{k}={id(v)}" for k, v in sorted(vars(value).items()) if k != "__abstractmethods__"]
    for table in (AttentionInterface, AttentionMaskInterface):
        lines += [f"{k}={id(v)}" for k, v in sorted(table._global_mapping.items()) if k != "effvlm"]
    return "\n".join(lines)


@pytest.mark.parametrize("method", [effvlm.tokens.VisionZip(keep=0.5), ToMe(keep=0.5, at="vision")], ids=["listening", "merging"])
def test_nothing_of_transformers_changes(model: Any, method: Any) -> None:
    inputs = prompts(TWO)
    plain = generate(model, inputs)
    before, implementation = _state_of_classes(), model.config.vision_config._attn_implementation
    modules = [(n, set(vars(m))) for n, m in model.named_modules()]
    with effvlm.reduce(model, method) as reducer:
        generate(model, inputs)
        assert _state_of_classes() == before
    assert reducer.report.engaged
    assert model.config.vision_config._attn_implementation == implementation
    assert modules == [(n, set(vars(m))) for n, m in model.named_modules()]
    assert torch.equal(generate(model, inputs), plain)


def test_two_models_with_different_recipes_in_one_process(model: Any) -> None:
    import copy

    other, inputs = copy.deepcopy(model), prompts(TWO)
    one, two = ToMe(keep=0.25), effvlm.tokens.VisionZip(keep=0.5)
    with effvlm.reduce(model, one):
        expected_one = generate(model, inputs)
    with effvlm.reduce(other, two):
        expected_two = generate(other, inputs)
    with effvlm.reduce(model, one), effvlm.reduce(other, two) as second:
        assert torch.equal(generate(model, inputs), expected_one)
        assert torch.equal(generate(other, inputs), expected_two)
        assert torch.equal(generate(model, inputs), expected_one)
    assert _counts(second) == (2, 2 * TOKENS, TOKENS)


def test_merging_in_the_tower_needs_layers_of_known_parts_and_plain_grids(model: Any) -> None:
    import tiny_vlms

    with pytest.raises(ValueError, match="use at='projector'"):
        effvlm.reduce(tiny_vlms.make("gemma3"), ToMe(keep=0.5, at="vision"))
    with pytest.raises(ValueError, match="which has 2, got 7"):
        effvlm.reduce(model, effvlm.tokens.FoPru(keep=0.5, layer=7))
    with pytest.raises(ValueError, match="no Attention"):
        effvlm.reduce(model, effvlm.tokens.Recipe([ToMe(keep=0.5, at="vision"), effvlm.tokens.FoPru(keep=0.5)]))


def test_generation_without_a_cache_is_refused(model: Any) -> None:
    with effvlm.reduce(model, ToMe(keep=0.5)), pytest.raises(ValueError, match="use_cache=True"):
        generate(model, prompts(ONE), use_cache=False)


def test_trace_shows_what_became_of_each_patch(model: Any) -> None:
    from PIL import Image

    reducer, picture = effvlm.reduce(model, Stride(keep=0.25)), Image.new("RGB", (64, 64), (200, 200, 200))
    with pytest.raises(RuntimeError, match="a call with images before"):
        reducer.trace(picture)
    with reducer:
        generate(model, prompts(TWO))
    drawn = reducer.trace(picture, index=1)
    cell = drawn.width // 4
    bright = [drawn.getpixel((x * cell + cell // 2, y * cell + cell // 2))[0] > 150 for y in range(4) for x in range(4)]
    assert [i for i, b in enumerate(bright) if b] == [2, 6, 10, 14]
    with pytest.raises(ValueError, match=r"image in 0 … 1"):
        reducer.trace(picture, index=2)


def test_beams_over_uneven_images_are_refused_where_they_would_be_wrong() -> None:
    import tiny_vlms

    model = tiny_vlms.make("gemma3")
    uneven = effvlm.tokens.Step(
        effvlm.tokens.Select(effvlm.tokens.picks.Top(effvlm.tokens.scores.Chance(), effvlm.tokens.budgets.Above(0.6)))
    )
    inputs = tiny_vlms.batch("gemma3", model, 2)
    with effvlm.reduce(model, uneven) as reducer:
        generate(model, inputs)
        first, second = reducer._encoder.traces["image"].plan.images[1:]
        assert first != second - first
        with pytest.raises(ValueError, match="the same number of tokens from each"):
            generate(model, inputs, num_beams=2)
