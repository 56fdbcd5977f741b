"""effvlm.experts: usage, drop, merge, average, upcycle, extend; on whole models of many kinds, and saved and loaded again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from moe_families import EXPERTS, expert_classes, families, tiny

from effvlm import demo, experts
from effvlm.experts import alignment, layers, tower
from effvlm.hf.experts import weights_of

# fmt: off
E = 16
DENSE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16}
MOE = {"moe_intermediate_size": 24, "num_experts": E, "norm_topk_prob": True}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": E}
LATENT = {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
          "v_head_dim": 16, "n_shared_experts": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
          "spatial_merge_size": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", MOE),
    "mixtral": ("Mixtral", {"num_local_experts": E}),
    "deepseek_v3": ("DeepseekV3", {**ROUTED, **LATENT, "n_group": 2, "topk_group": 2, "num_key_value_heads": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": E}),
    "qwen3_vl_moe": ("Qwen3VLMoe", {**MOE, **ROPE}),
    "nemotron_h": ("NemotronH", {**ROUTED, "n_group": 1, "topk_group": 1, "mlp_hidden_act": "relu2",
                                 "layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 24}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**MOE, "moe_num_experts": E, "moe_layer_start_index": 1, "moe_k": 2}),
    "afmoe": ("Afmoe", {**MOE, "num_dense_layers": 1, "num_shared_experts": 1}),
    "jamba": ("Jamba", {"num_experts": E, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
                        "attn_layer_offset": 0, "use_mamba_kernels": False}),
}
NOT_NORMALISED = {"jamba"}  # its weights are a softmax over all experts
IDS = {"input_ids": torch.tensor([[5, 9]])}
# fmt: on


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    sizes, config = {**DENSE, **options}, getattr(transformers, f"{name}Config")
    if "VL" not in name:
        return getattr(transformers, f"{name}ForCausalLM")(config(**sizes)).eval()
    made = config(text_config=sizes, vision_config=VISION, tie_word_embeddings=False)
    return getattr(transformers, f"{name}ForConditionalGeneration")(made).eval()


def make(kind: str) -> Any:
    """A small random mixture whose every tensor matters."""
    model = build(MODELS[kind][0], num_experts_per_tok=2, **MODELS[kind][1])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in name for part in ("inv_freq", "norm", "A_log")):
            torch.nn.init.normal_(tensor, std=0.02 if "correction" in name else 0.3)
    return model


def tokens(n: int = 20) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(3))}


def measured_as(model: Any, weights: list[float]) -> experts.Usage:
    names = layers.routed(model, "test")
    return experts.Usage({n: torch.tensor(weights).long() for n in names}, {n: torch.tensor(weights).double() for n in names})


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor] = IDS) -> torch.Tensor:
    return model(**inputs).logits


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    made, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval()


def routers(model: Any) -> dict[str, Any]:
    blocks = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers.routed(model, "test")}
    return {name: getattr(block, "gate", None) or block.router for name, block in blocks.items()}


def test_usage_counts_what_a_loop_counts_and_skips_sentinels() -> None:
    module = torch.nn.ModuleDict({"experts": tiny(*expert_classes("mixtral.modeling_mixtral"))})
    ids = torch.tensor([[0, 1], [1, EXPERTS], [-1, 3], [1, 3]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [1.0, 0.0], [0.5, 0.125]])
    module.experts.forward = lambda *args, **kwargs: None
    measured = experts.usage(module, lambda m: m.experts(torch.randn(4, 32), ids, top_k_weights=weights))
    assert measured.counts["experts"].tolist() == [1, 3, 0, 1]
    assert measured.weights["experts"].tolist() == [0.5, 1.75, 0.0, 0.125]
    assert "3 of 4      1    60.0 %" in str(measured)


def test_usage_leaves_out_padding_and_unwanted_tokens_and_restores_the_model() -> None:
    model = make("mixtral").train()
    model.model.layers[0].eval()
    padded = {"input_ids": torch.tensor([[0, 0, 5, 9], [4, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])}
    measured = experts.usage(model, [padded, padded])
    fives = experts.usage(model, [padded], tokens=lambda inputs: inputs["input_ids"] == 5)
    assert {int(c.sum()) for c in measured.counts.values()} == {2 * 6 * 2}
    assert {int(c.sum()) for c in fives.counts.values()} == {2 * 2}
    assert {round(float(w.sum()), 4) for w in measured.weights.values()} == {12.0}  # Mixtral's weights sum to 1
    for name, weights in measured.balanced(fives).weights.items():
        torch.testing.assert_close(weights, measured.weights[name] / 12 + fives.weights[name] / 2)
    with pytest.raises(RuntimeError, match="in the middle"):
        experts.usage(model, lambda m: (_ for _ in ()).throw(RuntimeError("in the middle")))
    assert not any(m._forward_pre_hooks for m in layers.routed(model, "test").values())
    assert (model.training, model.model.layers[0].training) == (True, False)


@pytest.mark.parametrize("kind", MODELS)
def test_unused_experts_are_dropped_without_a_trace_and_the_model_reloads(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    before, measured = logits(model), experts.usage(model, [IDS])
    report, after = experts.drop(model, 0.75, measured), logits(model)
    assert (report.experts, report.weight) == (("16", "12"), pytest.approx(1))
    assert "16 → 12 experts each" in str(report)
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) < report.parameters[0]
    if kind not in NOT_NORMALISED:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(logits(again), after, rtol=1e-6, atol=1e-6)  # some are stored transposed
    assert {m.num_experts for m in layers.routed(again, "test").values()} == {12}


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
def test_dropped_experts_are_as_ones_that_no_token_may_choose(kind: str) -> None:
    """The bias of the choice says it in the old model; so tokens that wanted a dropped expert get their next best."""
    model = make(kind)
    keep = {name: [0, 2, 3, 5, 8, 11, 12, 15] for name in layers.routed(model, "test")}
    closed = copy.deepcopy(model)
    for router in routers(closed).values():
        bias = router.bias if kind == "gpt_oss" else router.e_score_correction_bias
        bias.data[[i for i in range(E) if i not in keep[next(iter(keep))]]] = -50
    assert not torch.allclose(logits(model, tokens()), logits(closed, tokens()), atol=1e-2)
    assert experts.drop(model, keep).weight is None
    torch.testing.assert_close(logits(model, tokens()), logits(closed, tokens()), rtol=1e-5, atol=1e-5)


def test_the_most_used_are_kept_ties_to_the_lower_and_the_same_number_in_each_group_of_the_router() -> None:
    model, grouped = make("mixtral"), make("deepseek_v3")
    a, b = layers.routed(model, "test")
    measured, ascending = measured_as(model, [1.0] * E), measured_as(grouped, [float(i) for i in range(E)])
    measured.weights[a][8:] = 2
    assert experts.drop(model, 10, measured).kept == {a: (0, 1, *range(8, 16)), b: tuple(range(10))}
    (group,) = experts.merge(copy.deepcopy(grouped), 6, ascending).groups.values()
    assert [{g < 3 for g in half} for half in (group[:8], group[8:])] == [{True}, {False}]
    assert [*experts.drop(grouped, 0.5, ascending).kept.values()] == [(4, 5, 6, 7, 12, 13, 14, 15)]


@pytest.mark.parametrize(("name", "why"), [
    ("ZayaForCausalLM", r"one row of .*out_proj.weight per expert \(16\), got shape \(17"),
    ("InklingForConditionalGeneration", r"one row of .*gate.weight per expert"),
    ("DeepseekV4ForCausalLM", "tid2eid beside the experts holds integers"),
])  # fmt: skip
def test_what_is_not_a_row_per_expert_is_refused(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, name).config_class())
    fewer = {n: m.num_experts - 2 for n, m in layers.routed(model, "test").items()}
    with pytest.raises(ValueError, match=r"on a device \(not quantised\), got float32 Parameter on meta|one row of"):
        layers.resize(model, "drop", fewer)
    monkeypatch.setattr(layers, "_check", lambda *a: None)
    with pytest.raises(ValueError, match=why):
        layers.resize(model, "drop", fewer)


@pytest.mark.parametrize("family", families())
def test_the_order_of_inner_units_is_found_in_every_family(family: str) -> None:
    for cls in expert_classes(family):
        module = tiny(cls)
        module.config._experts_implementation_internal = "eager"
        x, ids, weights = torch.randn(6, weights_of(module)[0].shape[2]), torch.ones(6, 1).long(), torch.ones(6, 1)
        order = torch.randperm(alignment.units(module, 1).shape[0])
        with torch.no_grad():
            before = module(x, ids, weights)
            for name in layers.fused(module):
                tensor = getattr(module, name)
                tensor[2] = tensor[1]
                tensor[1] = alignment.permuted(module, name, tensor[1].clone(), order)
            torch.testing.assert_close(module(x, ids, weights), before, rtol=1e-4, atol=1e-4)
        assert torch.equal(order[alignment.aligned(module, 1, to=2)], torch.arange(len(order)))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging_twins_changes_nothing_if_aligned(kind: str, tmp_path: Path) -> None:
    """Expert 2·i + 1 is expert 2·i with its inner units in another order, and a router row a bit shorter."""
    model, order = make(kind), torch.randperm(24)
    for name, module in layers.routed(model, "test").items():
        for weight, tensor in ((getattr(module, t).data, t) for t in layers.fused(module)):
            for i in range(0, E, 2):
                weight[i + 1] = alignment.permuted(module, tensor, weight[i].clone(), order)
        router = routers(model)[name]
        router.top_k = 1
        for rows in router.parameters():
            rows.data[1::2] = 0.9 * rows.data[::2]
    model.config.num_experts_per_tok = 1
    measured, before, unaligned = measured_as(model, [3.0, 1.0] * 8), logits(model, tokens()), copy.deepcopy(model)
    report = experts.merge(model, 8, measured)
    assert (*report.groups.values(), *report.centres.values()) == 2 * (tuple(i // 2 for i in range(E)),) + 2 * (
        tuple(range(0, E, 2)),
    )
    # not quite all tokens: the shorter twin wins where the longer one's logit is negative
    assert ((logits(model, tokens()) - before).abs().amax(-1) < 1e-4).float().mean() > 0.9
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))
    experts.merge(unaligned, 8, measured, align=False)
    assert ((logits(unaligned, tokens()) - before).abs().amax(-1) < 1e-4).float().mean() < 0.1


def test_a_merged_expert_is_the_mean_by_usage_and_its_row_the_centres_or_the_mean() -> None:
    model, share = make("mixtral"), torch.tensor([3.0, 2.0, 1.0, 1.0] + [0.0] * 12)
    a, module = next(iter(layers.routed(model, "test").items()))
    measured, by_mean, old = measured_as(model, share.tolist()), copy.deepcopy(model), copy.deepcopy(module)
    row = routers(by_mean)[a].weight.detach()
    group = torch.tensor(experts.merge(model, 2, measured, by="weights", align=False).groups[a])
    experts.merge(by_mean, 2, measured, by="weights", align=False, router="mean")
    for new in range(2):
        weight = torch.where(group == new, share, 0)
        mean = torch.einsum("e,eij->ij", weight / weight.sum(), old.down_proj)
        torch.testing.assert_close(layers.routed(model, "test")[a].down_proj[new], mean)
        torch.testing.assert_close(routers(by_mean)[a].weight[new], weight @ row / weight.sum())
    assert torch.equal(routers(model)[a].weight, row[:2])


def test_average_moves_towards_the_mean_and_leaves_routers(tmp_path: Path) -> None:
    model = make("gpt_oss")
    old, module = copy.deepcopy(model), next(iter(layers.routed(model, "test").values()))
    was = {n: getattr(next(iter(layers.routed(old, "test").values())), n) for n in layers.fused(module)}
    for beta, left in ((0.25, 0.75), (1, 0.0)):
        assert experts.average(model, beta).model is model
        for name, tensor in was.items():
            torch.testing.assert_close(getattr(module, name), left * tensor + (1 - left) * tensor.mean(0, keepdim=True))
    assert all(torch.equal(r.weight, o.weight) for r, o in zip(routers(model).values(), routers(old).values(), strict=True))
    torch.testing.assert_close(logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen3_vl_moe"])
def test_the_dense_model_computes_what_equal_experts_do(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    report = experts.average(model, dense=True)
    assert report.parameters[1] == sum(p.numel() for p in report.model.parameters()) < report.parameters[0]
    experts.average(model)
    torch.testing.assert_close(logits(report.model), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(reloaded(report.model, tmp_path)), logits(report.model))


@pytest.mark.parametrize(("name", "options", "cls"), [
    ("Qwen3", {"tie_word_embeddings": True}, "Qwen3Moe"),
    ("Qwen3VL", ROPE, "Qwen3VLMoe"),
    ("Mistral", {"sliding_window": 4}, "Mixtral"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, "Mixtral"),
    ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}, "GraniteMoe"),
])  # fmt: skip
def test_copies_of_a_dense_model_compute_what_it_does(name: str, options: dict[str, Any], cls: str, tmp_path: Path) -> None:
    model, inputs = build(name, **options), tokens(12)
    report = experts.upcycle(model, 4)
    assert type(report.model).__name__.startswith(cls)
    torch.testing.assert_close(logits(report.model, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert len({round(r.weight[0, 0].item(), 6) for r in routers(report.model).values()}) == 2
    torch.testing.assert_close(logits(reloaded(report.model, tmp_path), inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_several_checkpoints_give_an_expert_each() -> None:
    first, second = build("Qwen3"), build("Qwen3")
    second.model.layers[1].mlp.down_proj.weight.normal_()
    moe = experts.upcycle([first, second], top_k=1).model
    for i, source in enumerate((first, second)):
        alone = copy.deepcopy(moe)
        experts.drop(alone, {name: [i] for name in layers.routed(alone, "test")})
        torch.testing.assert_close(logits(alone), logits(source), rtol=1e-5, atol=1e-5)
    second.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"got model.layers.0.self_attn.q_proj.weight, different by 0.001 in model 1"):
        experts.upcycle([first, second])
    assert experts.upcycle([first, second], tolerance=2e-3).experts == ("1 (dense)", "2")


CLIP = {"input_ids": torch.tensor([[5, 6, 39]]), "pixel_values": torch.linspace(-3, 3, 1536).sin().view(2, 3, 16, 16)}


def clip() -> Any:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen, read = {**sizes, "image_size": 16, "patch_size": 4}, {**sizes, "vocab_size": 40}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=read, vision_config=seen)).eval()


@torch.no_grad()
def test_clip_becomes_a_mixture_that_computes_the_same_trains_and_saves(tmp_path: Path) -> None:
    model = clip()
    before = model(**CLIP).logits_per_image
    assert "4 layers, 1 (dense) → 3 experts each" in str(experts.upcycle(model, 3))
    torch.testing.assert_close(model(**CLIP).logits_per_image, before, rtol=1e-4, atol=1e-4)
    assert sum(int(c.sum()) for c in experts.usage(model, [CLIP]).counts.values()) == 2 * 2 * (2 * 17 + 3)
    with pytest.raises(TypeError, match=r"use effvlm.experts.tower.save"):
        model.save_pretrained(tmp_path)
    tower.save(model, tmp_path)
    assert torch.equal(tower.load(tmp_path)(**CLIP).logits_per_image, model(**CLIP).logits_per_image)
    with torch.enable_grad():
        model(**CLIP).logits_per_image.sum().backward()
    assert all(m.router.weight.grad is not None for m in model.modules() if isinstance(m, tower.TowerMoE))
    with pytest.raises(ValueError, match=r"upcycle put into a tower"):
        experts.drop(model, {name: [0, 1] for name in layers.routed(model, "test")})


@torch.no_grad()
def test_clips_with_other_feed_forwards_are_its_experts() -> None:
    first, second = clip(), clip()
    for mlp in tower.feed_forwards(second).values():
        mlp.fc2.weight.normal_(std=0.1)
        mlp.fc1.bias.normal_(std=0.1)
    wanted, moe = second(**CLIP).logits_per_image, experts.upcycle([first, second], top_k=1).model
    for module in layers.routed(moe, "test").values():  # all tokens to the second
        module.register_forward_pre_hook(lambda _, args: (args[0], torch.ones_like(args[1]), args[2]))
    torch.testing.assert_close(moe(**CLIP).logits_per_image, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "qwen3_vl_moe"])
def test_an_expert_is_added_and_the_report_says_where(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    report = experts.extend(model, usage=(measured := experts.usage(model, [IDS])))
    assert "16 → 17" in str(report)
    assert report.sources == {n: int(w.argmax()) for n, w in measured.weights.items()}
    for name, (dim, index) in report.rows.items():
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
        source = next(s for n, s in report.sources.items() if name.startswith(n.rpartition(".")[0]))
        assert f"train {name}, index 16 of dimension {dim}" in str(report) or len(report.rows) > 8
        assert torch.equal(tensor.select(dim, index), tensor.select(dim, source))
    torch.testing.assert_close(logits(reloaded(model, tmp_path)), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "top_k", "router", "unchanged"), [
    ("mixtral", 1, "copy", True), ("mixtral", 1, "mean", True), ("mixtral", 2, "copy", False),
    ("gpt_oss", 2, "closed", True), ("nemotron_h", 2, "closed", True),
])  # fmt: skip
def test_what_new_rows_do_to_outputs_is_as_documented(kind: str, top_k: int, router: str, unchanged: bool) -> None:
    model = make(kind)
    for r in routers(model).values():
        r.top_k = top_k
    before = logits(model, tokens(30))
    experts.extend(model, 3, router=router)
    assert torch.allclose(logits(model, tokens(30)), before, rtol=1e-4, atol=1e-4) == unchanged


# fmt: off
Call = Callable[[Any, str, str, experts.Usage], Any]  # with a model, its first and its last layer, and its usage
REFUSED: dict[str, list[tuple[Call, str]]] = {"mixtral": [
    (lambda m, a, b, u: experts.usage(m, IDS), "TypeError.* iterable of dicts of inputs, or a function of the model, got dict"),
    (lambda m, a, b, u: experts.drop(torch.nn.Sequential(m.model.layers[0].mlp), {"0.experts": [0]}), "TypeError.* Hugging Face"),
    (lambda m, a, b, u: experts.drop(m, 1, u), "at least top-k = 2 experts"),
    (lambda m, a, b, u: experts.drop(m, {a: [0, 1], b: [0, 1, 2]}), "same number of experts in every layer, since MixtralConfig"),
    (lambda m, a, b, u: experts.drop(m, {a: [0, 1]}), "keep for exactly the model's layers"),
    (lambda m, a, b, u: experts.drop(m, {a: [0, 1], b: [3, 16]}), "different ids in 0 … 15"),
    (lambda m, a, b, u: experts.drop(m, 4), "expected usage .* to choose by"),
    (lambda m, a, b, u: experts.drop(m, 4, experts.Usage({a: u.counts[a]}, {a: u.weights[a]})), "expected usage of this model"),
    (lambda m, a, b, u: experts.upcycle(build("Llama", mlp_bias=True), 4), "mlp_bias to be False, which MixtralConfig"),
    (lambda m, a, b, u: experts.upcycle(m, 2), "a model of Qwen3VL, .* got MixtralForCausalLM"),
    (lambda m, a, b, u: experts.upcycle([build("Llama"), build("Qwen3")]), "of one kind, got LlamaForCausalLM and Qwen3"),
    (lambda m, a, b, u: experts.extend(m), "expected from_expert, or usage"),
    (lambda m, a, b, u: experts.extend(m, 0, router="closed"), "a router with a bias"),
], "deepseek_v3": [
    (lambda m, a, b, u: experts.drop(m, {a: range(8, 16)}), r"same number from each of the router's groups .* got \[0, 8\]"),
    (lambda m, a, b, u: experts.drop(m, 7, u), "multiple of the 2 groups .* got 7 experts"),
    (lambda m, a, b, u: experts.drop(m, 2, u), "two or more experts each, got 2"),
    (lambda m, a, b, u: experts.merge(m, 5, u), "a multiple of the 2 groups"),
    (lambda m, a, b, u: experts.extend(m, 0), "chooses among all experts, got 2 groups of 8"),
    (lambda m, a, b, u: experts.average(m, dense=True), "a dense sibling .* got DeepseekV3ForCausalLM"),
]}
# fmt: on


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_arguments_are_named_and_change_nothing(kind: str) -> None:
    model = make(kind)
    before, config, names = copy.deepcopy(model.state_dict()), model.config.to_dict(), list(layers.routed(model, "test"))
    for call, said in REFUSED[kind]:
        with pytest.raises(TypeError if said.startswith("TypeError") else ValueError, match=said.removeprefix("TypeError.* ")):
            call(model, names[0], names[-1], measured_as(model, [1.0] * E))
    assert model.config.to_dict() == config
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_the_demo_model_keeps_its_answers_with_the_experts_it_uses(tmp_path: Path) -> None:
    model, processor = demo.load()
    some = demo.samples(40, seed=3)
    words = [f"{demo.prompt(s.question)} {s.answer}" for s in some]
    inputs = processor(images=[s.image for s in some], text=words, return_tensors="pt", padding=True)
    image = inputs["input_ids"] == model.config.image_token_id
    seen, read = (experts.usage(model, [inputs], tokens=lambda _, m=m: m) for m in (image, ~image))
    assert experts.drop(model, 0.5, read.balanced(seen)).weight > 0.85
    assert (right := demo.evaluate(model, 40, processor=processor)["right"]) >= 36
    assert demo.evaluate(reloaded(model, tmp_path), 40, processor=processor)["right"] == right
