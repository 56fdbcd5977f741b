"""Listening to vision towers and merging inside them, against plain attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vlms
import torch

import effvlm
from effvlm.hf.families import FAMILIES
from effvlm.hf.watch import Watch, layer_index
from effvlm.tokens import Attention, Keys, Pixels, Text, ToMe
from effvlm.tokens.budgets import kept
from effvlm.tokens.merges import Bipartite


def _tower(family: str, model: Any) -> Any:
    return getattr(model.base_model, FAMILIES[family].tower)


def _inputs(family: str, model: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    pictures = [tiny_vlms.FAMILIES[family].picture(model, i) for i in range(2)]
    inputs = {k: torch.cat([p[0][k] for p in pictures]) for k in pictures[0][0]}
    return inputs, FAMILIES[family].layout(model, inputs, [n for _, n in pictures])


@pytest.mark.parametrize("family", list(tiny_vlms.FAMILIES))
def test_each_token_belongs_to_the_patches_that_its_layout_names(family: str) -> None:
    """A change of a patch's pixels changes its own token most."""
    model = tiny_vlms.make(family)
    inputs, layouts = _inputs(family, model)
    patches = torch.cat([layout.patches for layout in layouts])

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model.get_image_features(**{**inputs, "pixel_values": pixels}, return_dict=True).pooler_output
        return torch.cat([f.flatten(0, -2) for f in out])

    pixels = inputs["pixel_values"]
    whole, g = encode(pixels), torch.Generator().manual_seed(0)
    flat = pixels.dim() <= 3  # patches already cut out
    side = 1 if flat else pixels.shape[-1] // 4
    total = pixels.flatten(0, -2).shape[0] if flat else pixels[..., 0, 0, 0].numel() * side * side
    if family.startswith("llava_"):  # crops that only fill up the batch are not encoded
        real = [*range(3), *range(5, 10)]
        numbers = [torch.tensor([r * side * side + k for k in range(side * side)]) for r in real]
        chosen = torch.cat(numbers)[torch.randperm(len(real) * side * side, generator=g)[:8]]
        places = {int(c): i for i, c in enumerate(torch.cat(numbers).tolist())}
    else:
        chosen, places = torch.randperm(total, generator=g)[:8], {}
    seen = 0
    for patch in chosen.tolist():
        changed = pixels.clone()
        noise = 0.05 * torch.randn(48 if flat and pixels.shape[-1] == 48 else pixels.shape[-1] if flat else 48, generator=g)
        if flat:
            changed.flatten(0, -2)[patch] += noise
        else:
            crop, row, column = patch // (side * side), patch // side % side * 4, patch % side * 4
            changed.flatten(0, -4)[crop][:, row : row + 4, column : column + 4] += noise.view(3, 4, 4)
        own = (patches == places.get(patch, patch)).any(1).nonzero()[:, 0].tolist()
        if own:  # what was cut off as padding has none
            assert int((encode(changed) - whole).norm(dim=1).argmax()) in own
            seen += 1
    assert seen >= 3


class _Dense(Watch):
    """The same signals from attention matrices."""

    def _score(self, s: Any, query: Any, key: Any, lse: Any, mask: Any, scaling: Any) -> torch.Tensor:
        logits = query @ key.mT * scaling
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        p = logits.softmax(-1)
        if s.rows == "cls" and self.prefix:
            p = p[:, :, :1]
        elif mask is not None:
            p = p[:, :, (mask[0, 0, 0] if mask.dtype == torch.bool else mask[0, 0, 0] == 0)] if len(p) == 1 else p
        p = p.mean(2)
        return {"mean": p.mean(1), "sum": p.sum(1), "max": p.amax(1), "none": p.transpose(1, 2)}[s.heads]


@pytest.mark.parametrize("family", list(tiny_vlms.FAMILIES))
def test_signals_are_those_of_the_attention_matrix(family: str) -> None:
    model = tiny_vlms.make(family)
    inputs, layouts = _inputs(family, model)
    if family == "gemma4":  # one image a call, so that a row of the mask speaks for all
        inputs = {k: v[1:] for k, v in inputs.items()}  # the one with padding
        layouts = FAMILIES[family].layout(model, inputs, [len(layouts[1].place)])
    wanted = [
        Attention(-2),
        Attention(0.5, "all", "max"),
        Attention(-1, "all", "sum"),
        Attention(-1, "cls", "none"),
        Keys(-2),
        Keys(1, "all"),
    ]
    found = []
    with torch.no_grad():
        plain = model.get_image_features(**inputs, return_dict=True).pooler_output
    for kind in (Watch, _Dense):
        watch = kind(_tower(family, model), wanted)
        with watch.encoding(), torch.no_grad():
            heard = model.get_image_features(**inputs, return_dict=True).pooler_output
        found.append(watch.read(layouts, None))
        for a, b in zip(heard, plain, strict=True):  # listening changes nothing, masks included
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    N = sum(len(layout.place) for layout in layouts)
    for signal in wanted:
        a, b = found[0][signal], found[1][signal]
        assert a.shape[0] == N
        assert a.abs().sum() > 0
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6), signal
    assert not hasattr(model, "_attn")
    assert _tower(family, model).config._attn_implementation != "effvlm"


def test_attention_received_sums_to_one_over_the_patches_of_a_call() -> None:
    model = tiny_vlms.make("paligemma")
    inputs, layouts = _inputs("paligemma", model)
    watch = Watch(_tower("paligemma", model), [Attention(-1, "all")])
    with watch.encoding(), torch.no_grad():
        model.get_image_features(**inputs, return_dict=True)
    assert torch.allclose(watch.read(layouts, None)[Attention(-1, "all")].view(2, 36).sum(1), torch.ones(2), atol=1e-5)


def test_windows_are_put_back_in_order() -> None:
    """Qwen2.5-VL's tower works window by window; pixels tell which token a signal belongs to."""
    model = tiny_vlms.make("qwen2_5_vl")
    batch = tiny_vlms.batch("qwen2_5_vl", model, 2)
    with effvlm.reduce(
        model, effvlm.tokens.Step(effvlm.tokens.Select(combine=effvlm.tokens.combines.Nearest(Keys(0))))
    ) as reducer:
        model.generate(**batch, max_new_tokens=1)
        plain = reducer._encoder.traces["image"].before.signals[Keys(0)]
        patch = 4 * 17  # of token 17, far from its place in the order of windows
        assert int(reducer._encoder._order(batch)[patch]) != patch
        batch["pixel_values"][patch : patch + 4] += 1.0
        model.generate(**batch, max_new_tokens=1)
        changed = reducer._encoder.traces["image"].before.signals[Keys(0)]
    assert ((changed - plain).norm(dim=1) > 1e-6).nonzero()[:, 0].tolist() == [17]


def test_text_and_pixels() -> None:
    model = tiny_vlms.make("llava")
    batch = tiny_vlms.batch("llava", model, 2)
    batch["pixel_values"][0, :, :4, 4:8] = batch["pixel_values"][0, :, :4, :4]  # patch 1 repeats patch 0
    both = effvlm.tokens.Recipe([effvlm.tokens.SliME(keep=0.9, top_p=1.0), effvlm.tokens.PixelPrune()])
    with effvlm.reduce(model, both) as reducer:
        model.generate(**batch, max_new_tokens=1)
    before = reducer._encoder.traces["image"].before
    difference = before.signals[Pixels()].view(2, 36)
    assert torch.isinf(difference[:, 0]).all()
    assert difference[0, 1] == 0
    assert (difference[1, 1:] > 0).all()
    ids = batch["input_ids"]
    for row in range(2):
        words = model.get_input_embeddings()(ids[row][(ids[row] != tiny_vlms.IMAGE) & (batch["attention_mask"][row] > 0)])
        cosine = torch.nn.functional.cosine_similarity(before.x.view(2, 36, -1)[row][:, None], words[None], dim=-1).mean(1)
        assert torch.allclose(before.signals[Text()].view(2, 36)[row], cosine, atol=1e-5)


def test_layers_by_number_and_by_share() -> None:
    assert [layer_index(i, 24) for i in (-2, 0, 23, 0.375, 0.21)] == [22, 0, 23, 9, 5]
    for bad in (24, -25):
        with pytest.raises(ValueError, match="which has 24"):
            layer_index(bad, 24)


def _merged_by_hand(tower: Any, pixels: torch.Tensor, layers: int, keep: float, prefix: int) -> list[dict[int, torch.Tensor]]:
    """Per image: place of each token's first patch → features after ``layers`` layers with ToMe between attention and MLP."""
    results = []
    for picture in pixels:
        x = tower.embeddings(picture[None])
        x = tower.pre_layrnorm(x)[0] if hasattr(tower, "pre_layrnorm") else x[0]
        members = [[i] for i in range(len(x))]
        pairs = Bipartite(keep).schedule(layers, len(x) - prefix)
        for layer, r in zip(tower.encoder.layers, pairs, strict=False):
            attention, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (
                p(y).view(len(x), attention.num_heads, -1).transpose(0, 1)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            sizes = torch.tensor([float(len(m)) for m in members])
            p = (q @ k.mT * attention.scale + sizes.log()).softmax(-1)
            x = x + attention.out_proj((p @ v).transpose(0, 1).flatten(1))
            metric = torch.nn.functional.normalize(k.mean(0)[prefix:], dim=-1)
            score = metric[::2] @ metric[1::2].T
            best = score.max(1)
            for i in sorted(range(len(score)), key=lambda i: (-float(best.values[i]), i))[:r]:
                source, target = prefix + 2 * i, prefix + 2 * int(best.indices[i]) + 1
                members[target] = members[target] + members[source]
                members[source] = []
            weight = sizes[:, None] * x
            groups = _groups(best, r, len(x), prefix)
            x = torch.stack([weight[g].sum(0) / sizes[g].sum() for g in groups])
            members = [m for m in members if m]
            x = x + layer.mlp(layer.layer_norm2(x))
        results.append({min(m) - prefix: row for m, row in zip(members, x, strict=True) if min(m) >= prefix})
    return results


def _groups(best: Any, r: int, N: int, prefix: int) -> list[list[int]]:
    """Rows of each new token, in the order of the anchors."""
    into = {i: [i] for i in range(N)}
    for i in sorted(range(len(best.values)), key=lambda i: (-float(best.values[i]), i))[:r]:
        source, target = prefix + 2 * i, prefix + 2 * int(best.indices[i]) + 1
        into[target].append(source)
        del into[source]
    return [into[k] for k in sorted(into)]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_tome_in_the_tower_is_the_papers(family: str, keep: float) -> None:
    model = tiny_vlms.make(family)
    batch = tiny_vlms.batch(family, model, 2)
    tower, prefix = _tower(family, model), int(family == "llava")
    layers = 3 if family == "llava" else 4  # features of the last but one, or the last
    reduced = effvlm.reduce(model, ToMe(keep=keep, at="vision"))(batch)
    features = reduced["mm_encoder_outputs"]["image"].pooler_output
    with torch.no_grad():
        expected = _merged_by_hand(tower, batch["pixel_values"], layers, keep, prefix)
        for got, rows in zip(features, expected, strict=True):
            assert len(got) == len(rows) == kept(keep, 36)
            x = torch.stack([rows[k] for k in sorted(rows)])
            if family == "paligemma":
                x = tower.post_layernorm(x)
            assert torch.allclose(got, model.base_model.multi_modal_projector(x[None])[0], atol=2e-5)


def test_merging_in_the_tower_leaves_no_trace_and_crops_keep_their_newlines() -> None:
    for family in ("llava_next", "llava_onevision"):
        model = tiny_vlms.make(family)
        batch = tiny_vlms.batch(family, model, 2)
        plain = model.generate(**batch, max_new_tokens=3, do_sample=False)
        with effvlm.reduce(model, ToMe(keep=0.3, at="vision")) as reducer:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        trace = reducer._encoder.traces["image"]
        newlines = trace.before.protected
        assert torch.isin(newlines.nonzero()[:, 0], trace.plan.anchor).all()
        assert trace.plan.apply(trace.before).size.sum() == len(trace.before)
        assert reducer.report.tokens_out < 0.5 * reducer.report.tokens_in
        assert all("forward" not in vars(m) for m in model.modules())
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), plain)
