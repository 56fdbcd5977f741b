"""effvlm.convert: attention layers as layers of constant state, in Hugging Face models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from effvlm.convert import SSMAttention, attention_to_ssm, distill
from effvlm.convert.cache import StateLayer

IDS = torch.randint(3, 64, (2, 25), generator=torch.Generator().manual_seed(5))


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, **more)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_seeded_layer_with_unit_decay_is_linear_attention() -> None:
    """Causal, unnormalised, with the trained projections, rotary embeddings and grouped keys: (QKᵀ/√d ∘ tril) V W."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = _llama()
    attention = model.model.layers[1].self_attn
    layer = attention_to_ssm(attention, unit_decay=True, norm=False)
    x = torch.randn(2, 90, 64)
    cos, sin = model.model.rotary_emb(x, torch.arange(90)[None])
    got, weights = layer(x, position_embeddings=(cos, sin))
    q, k, v = (p(x).view(2, 90, -1, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    wanted = attention.o_proj(((q @ k.mT / 4).tril() @ v).transpose(1, 2).reshape(2, 90, 64))
    assert weights is None
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("layers", [[1], [0, 2], None])
def test_with_a_cache_it_is_what_it_is_without(layers: list[int] | None) -> None:
    """Hybrids and all layers: prefill and steps, a second turn, left padding, beams; the state does not grow."""
    model = attention_to_ssm(_llama(), layers)
    whole = model(IDS, use_cache=False).logits
    first = model(IDS[:, :20], use_cache=True)
    cache = first.past_key_values
    steps = [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in (20, 21)]
    last = model(IDS[:, 22:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first.logits, *steps, last], 1), whole, rtol=1e-5, atol=1e-5)
    kept = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
    assert len(kept) == (3 if layers is None else len(layers))
    assert all(layer.state.shape == (2, 4, 16, 16) and layer.get_seq_length() == 25 for layer in kept)
    padded = torch.cat([torch.full((2, 6), 5), IDS], 1)  # not the padding token, whose embedding is zero
    mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    again = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    said = model.generate(IDS, use_cache=True, **greedy)
    assert torch.equal(said, model.generate(IDS, use_cache=False, **greedy))
    beams = model.generate(IDS, num_beams=3, use_cache=True, **greedy)
    assert torch.equal(beams, model.generate(IDS, num_beams=3, use_cache=False, **greedy))


@torch.no_grad()
def test_caches_that_cannot_hold_a_state_are_refused() -> None:
    from transformers import DynamicCache, StaticCache

    model = attention_to_ssm(_llama(), [1])
    with pytest.raises(TypeError, match="fresh DynamicCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    used = _llama()(IDS, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(TypeError, match="25 tokens at layer 1"):
        model(IDS[:, :1], past_key_values=used)
    cache = model(IDS).past_key_values
    with pytest.raises(RuntimeError, match="cannot give tokens back"):
        cache.crop(-3)


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1, 2\], got \[7\]"):
        attention_to_ssm(_llama(), [7])
    with pytest.raises(ValueError, match="got all"):
        attention_to_ssm(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="found none"):
        distill(_llama(), _llama(), [{"input_ids": IDS}], layer_steps=1)


def test_distillation_teaches_the_layers_and_leaves_the_rest() -> None:
    """Both stages lower their loss; the teacher, frozen parameters and requires_grad stay as they were."""
    teacher = _llama()
    student = attention_to_ssm(copy.deepcopy(teacher), [0, 2])
    student.model.embed_tokens.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in student.named_parameters()}
    theirs = copy.deepcopy(teacher.state_dict())
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 64, (4, 33), generator=generator)} for _ in range(60)]
    heard: list[int] = []
    done = distill(student, teacher, batches, layer_steps=40, lr=5e-3, on_step=lambda step, loss: heard.append(step))
    assert heard == list(range(1, 61))
    assert done.stage == ["layers"] * 40 + ["logits"] * 20
    assert sum(done.losses[30:40]) < 0.8 * sum(done.losses[:10])
    assert sum(done.losses[55:]) < 0.9 * sum(done.losses[40:45])
    own = {f"{n}.{k}" for n, m in student.named_modules() if isinstance(m, SSMAttention) for k, _ in m.named_parameters()}
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= own
    assert len(changed) > len(own) // 2
    assert not student.model.embed_tokens.weight.requires_grad
    assert student.lm_head.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), theirs.values(), strict=True))
