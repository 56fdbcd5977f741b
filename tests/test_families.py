"""Every family against an oracle: the whole sequence, the reduced features at their anchors' places, all other visual tokens
masked."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny_vlms
import torch
from transformers import DynamicCache

import effvlm
from effvlm.hf.positions import positions_for_forward, positions_for_generate
from effvlm.tokens import Method, Recipe, Stride, ToMe

LIMIT = 1e-5  # on float32 logits with a standard deviation of about 1
METHODS = {"drop": Stride(keep=0.4), "merge": ToMe(keep=0.4)}


@pytest.fixture(scope="module", params=list(tiny_vlms.FAMILIES))
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_vlms.make(request.param)


def _oracle(model: Any, reducer: effvlm.hf.reduce.Reducer, inputs: dict[str, Any], positions: Any) -> dict[str, Any]:
    """Full-length inputs that must give the same logits as the reducer's."""
    inputs = dict(inputs)
    ids = inputs["input_ids"]
    position_ids = positions(model, inputs, 0)
    encoded = {}
    mask = inputs["attention_mask"].clone()
    for modality, trace in reducer._encoder.traces.items():
        encode = getattr(model.base_model, f"get_{modality}_features")
        names = [n for n in inspect.signature(encode).parameters if inputs.get(n) is not None]
        with torch.no_grad():
            out = encode(**{n: inputs[n] for n in names}, return_dict=True)
        plan = trace.plan
        kept = torch.zeros(plan.old, dtype=torch.bool)
        kept[plan.anchor] = True
        visual = ids == getattr(model.config, f"{modality}_token_id")
        mask[visual] = kept.to(mask.dtype)

        def placed(features: Any, plan: Any = plan) -> Any:
            flat = torch.cat([f.flatten(0, -2) for f in features])
            dense = torch.zeros(plan.new, plan.old).index_put((plan.rows(), plan.source.long()), plan.shares(), accumulate=True)
            flat = flat.index_copy(0, plan.anchor, dense @ flat)
            if isinstance(features, torch.Tensor):
                return flat.view_as(features)
            return list(flat.split([len(f) for f in features]))

        out.pooler_output = placed(out.pooler_output)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [placed(level) for level in out.deepstack_features]
        encoded[modality] = out
        for n in names:
            inputs.pop(n)
    return {**inputs, "attention_mask": mask, "position_ids": position_ids, "mm_encoder_outputs": encoded}


def _generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )


def _both(model: Any, inputs: dict[str, Any], method: Method, **options: Any) -> tuple[Any, Any]:
    with effvlm.reduce(model, method) as reducer:
        got = _generate(model, inputs, **options)
    assert reducer.report.engaged
    return got, _generate(model, _oracle(model, reducer, inputs, positions_for_generate), **options)


def _assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert (a - b).abs().max() <= LIMIT


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", list(METHODS))
def test_greedy(case: tuple[str, Any], rows: int, kind: str) -> None:
    family, model = case
    _assert_same(*_both(model, tiny_vlms.batch(family, model, rows), METHODS[kind]))


@pytest.mark.parametrize("rows", [1, 4])
def test_beams(case: tuple[str, Any], rows: int) -> None:
    family, model = case
    got, expected = _both(model, tiny_vlms.batch(family, model, rows), Stride(keep=0.4), num_beams=4)
    assert torch.equal(got.sequences, expected.sequences)
    assert (got.sequences_scores - expected.sequences_scores).abs().max() <= LIMIT


@pytest.mark.parametrize("rows", [1, 4])
def test_chunked_prefill(case: tuple[str, Any], rows: int) -> None:
    family, model = case
    if family in ("gemma3", "paligemma"):
        pytest.skip("blocks that attend in both directions cannot be cut into chunks")
    _assert_same(*_both(model, tiny_vlms.batch(family, model, rows), ToMe(keep=0.4), prefill_chunk_size=7))


@pytest.mark.parametrize("left", [True, False])
def test_forward(case: tuple[str, Any], left: bool) -> None:
    """Plain model(**inputs), padded on either side: logits of everything that is left."""
    family, model = case
    inputs = tiny_vlms.batch(family, model, 4, left)
    with effvlm.reduce(model, ToMe(keep=0.4)) as reducer, torch.no_grad():
        got = model(**inputs).logits
    with torch.no_grad():
        expected = model(**_oracle(model, reducer, inputs, positions_for_forward)).logits
    keep = reducer._sizes > 0
    for row in range(4):
        real = keep[row] & (inputs["attention_mask"][row] > 0)
        mine = got[row, -int(real.sum()) :] if left else got[row, : int(real.sum())]
        assert (mine - expected[row, real]).abs().max() <= LIMIT


@pytest.mark.parametrize("rows", [1, 4])
def test_two_turns(case: tuple[str, Any], rows: int) -> None:
    family, model = case
    inputs = tiny_vlms.batch(family, model, rows)
    more = torch.randint(tiny_vlms.FIRST_WORD, tiny_vlms.VOCAB, (rows, 5), generator=torch.Generator().manual_seed(9))

    def second(first: Any, mask: torch.Tensor, **fixed: Any) -> Any:
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([mask, mask.new_ones((rows, ids.shape[1] - mask.shape[1]))], dim=1)
        extra = {} if family.startswith(("qwen", "gemma4")) else tiny_vlms.FAMILIES[family].extra(ids)
        return _generate(
            model, {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values, **extra, **fixed}
        )

    with effvlm.reduce(model, ToMe(keep=0.4)) as reducer:
        first = _generate(model, inputs)
        got = second(first, inputs["attention_mask"])
    whole = _oracle(model, reducer, inputs, positions_for_generate)
    before = _generate(model, whole)
    last = whole["position_ids"][..., -1:]
    positions = torch.cat([whole["position_ids"], last + 1 + torch.arange(9)], dim=-1)
    expected = second(before, whole["attention_mask"], position_ids=positions)
    _assert_same(got, expected)


def test_keeping_everything_changes_no_bit(case: tuple[str, Any]) -> None:
    family, model = case
    inputs = tiny_vlms.batch(family, model, 2)
    plain = _generate(model, inputs)
    for method in (Stride(keep=1.0), ToMe(keep=1.0), Recipe([ToMe(keep=1), Stride(keep=1)])):
        with effvlm.reduce(model, method) as reducer:
            same = _generate(model, inputs)
        assert not reducer.report.engaged
        assert torch.equal(same.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(same.logits, plain.logits, strict=True))


def test_the_explicit_form(case: tuple[str, Any]) -> None:
    family, model = case
    inputs = tiny_vlms.batch(family, model, 2)
    reducer = effvlm.reduce(model, ToMe(keep=0.4))
    explicit = _generate(model, reducer(inputs))
    with reducer:
        implicit = _generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(explicit.logits, implicit.logits, strict=True))
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks


def test_a_cache_of_the_users_own(case: tuple[str, Any]) -> None:
    family, model = case
    inputs = tiny_vlms.batch(family, model, 1)
    with effvlm.reduce(model, Stride(keep=0.4)) as reducer:
        got = _generate(model, {**inputs, "past_key_values": DynamicCache(config=model.config.get_text_config())})
    _assert_same(got, _generate(model, _oracle(model, reducer, inputs, positions_for_generate)))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", [ToMe(keep=0.4), Stride(keep=0.4)], ids=["merge", "drop"])
def test_proportional_attention_adds_log_sizes(family: str, method: Method) -> None:
    """Against the whole sequence with a mask that holds the logarithm of what each key stands for."""
    model = tiny_vlms.make(family)
    inputs = tiny_vlms.batch(family, model, 3)
    with effvlm.reduce(model, Recipe([method], attention="proportional")) as reducer, torch.no_grad():
        got = model(**inputs).logits
    whole = _oracle(model, reducer, inputs, positions_for_forward)
    sizes, length = reducer._sizes, inputs["input_ids"].shape[1]
    visual = inputs["input_ids"] == tiny_vlms.IMAGE
    assert torch.allclose(sizes[visual].sum(), visual.sum().float())
    assert (sizes[visual] > 1).any()
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & (whole["attention_mask"] > 0)[:, None, None]
    whole["attention_mask"] = torch.where(seen, sizes.clamp_min(1e-9).log()[:, None, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(**whole).logits
    for row in range(3):
        real = (sizes[row] > 0) & (inputs["attention_mask"][row] > 0)
        assert (got[row, -int(real.sum()) :] - expected[row, real]).abs().max() <= LIMIT


def test_proportional_attention_in_every_way_of_generating() -> None:
    """Steps, chunks, beams of one, turns and texts in between give what one forward over everything gives."""
    model = tiny_vlms.make("llava")
    inputs, recipe = tiny_vlms.batch("llava", model, 2), Recipe([ToMe(keep=0.4)], attention="proportional")
    plain = _generate(model, {"input_ids": inputs["input_ids"][:, -6:]})
    with effvlm.reduce(model, recipe):
        out = _generate(model, inputs)
        chunked = _generate(model, inputs, prefill_chunk_size=7)
        beam = _generate(model, inputs, num_beams=3)
        text = _generate(model, {"input_ids": inputs["input_ids"][:, -6:]})
        ids = out.sequences[:, :-1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["attention_mask"].shape[1]).long()], 1)
        with torch.no_grad():
            place = positions_for_generate(model, {"input_ids": ids, "attention_mask": mask}, 0)
            again = model(**{**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": place}).logits[:, -4:]
    for step, logits in enumerate(out.logits):
        assert (logits - again[:, step]).abs().max() <= LIMIT
        assert (logits - chunked.logits[step]).abs().max() <= LIMIT
    assert beam.sequences.shape == out.sequences.shape
    assert all(torch.equal(a, b) for a, b in zip(text.logits, plain.logits, strict=True))
    assert model.config.text_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="a with block"):
        effvlm.reduce(model, recipe)(inputs)
