"""Encoding images by the model's own towers, and reducing their tokens by a recipe's steps."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch

from effvlm.hf.families import family_of
from effvlm.hf.layouts import Layout
from effvlm.hf.merging import Merging
from effvlm.hf.report import Report, Stage
from effvlm.hf.trace import Trace
from effvlm.hf.watch import Watch
from effvlm.tokens import Plan, Recipe, Text, Tokens
from effvlm.tokens.combines import nearest
from effvlm.tokens.groups import Image
from effvlm.tokens.merges import Bipartite

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def pixels_of(inputs: dict[str, Any]) -> list[str]:
    """The modalities, ``"image"`` and ``"video"``, that have pixels among the inputs."""
    return [m for m, name in _PIXELS.items() if inputs.get(name) is not None]


class Encoder:
    """Encodes and reduces, modality by modality.

    Attributes:
        traces: by modality, what became of the tokens of the last call.
        expansion: how many sequences ``generate`` will make of each row.
    """

    def __init__(self, model: Any, recipe: Recipe, report: Report) -> None:
        self.model, self.report = model, report
        self.family = family_of(model)
        self.tower = getattr(model.base_model, self.family.tower)
        steps = recipe.steps()
        self.inside = [s for s in steps if s.at == "vision"]
        self.after = [s for s in steps if s.at != "vision"]
        self._check_inside()
        self.needs = tuple(dict.fromkeys(s for step in self.after for s in step.do.needs))
        if self.inside and self.needs:
            raise ValueError(f"reduce: tokens merged in the vision tower have no {self.needs[0]} any more; use at='projector'")
        Watch(self.tower, self.needs)  # a layer that is not there is an error now, not at the first image
        report.stages = [Stage(type(s.do).__name__, s.at) for s in (*self.inside, *self.after)]
        self.traces: dict[str, Trace] = {}
        self.expansion = 1
        self.proportional = recipe.attention == "proportional"

    def _check_inside(self) -> None:
        if not self.inside:
            return
        if len(self.inside) > 1 or not isinstance(self.inside[0].do, Bipartite):
            raise ValueError("reduce: expected at most one step in the vision tower, a bipartite matching such as ToMe's")
        if not self.family.merges:
            raise ValueError(
                f"reduce: {self.model.config.model_type} makes each token of several patches after the vision tower, "
                "so that merging them inside saves none; use at='projector'"
            )
        Merging(self.tower, self.inside[0].do, self._layers())

    def _layers(self) -> int:
        """After how many of the tower's layers the model reads features."""
        config = self.model.config
        layer = getattr(config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise ValueError("reduce: features of several layers are read, so tokens cannot be merged inside; use at='projector'")
        total: int = config.vision_config.num_hidden_layers
        return layer if layer >= 0 else total + 1 + layer

    def __call__(self, ids: torch.Tensor, inputs: dict[str, Any], sizes: torch.Tensor) -> dict[str, Any]:
        """``mm_encoder_outputs``; pixels are taken out of ``inputs``.

        Args:
            ids: (B, L) int64, with the placeholders of the images that are to be encoded.
            inputs: the model's inputs.
            sizes: (B, L) float32, which get how many tokens each place stands for: 0 where it is gone.
        """
        outputs: dict[str, Any] = {}
        used: set[str] = set()
        self.traces = {}
        for modality in pixels_of(inputs):
            encode = getattr(self.model.base_model, f"get_{modality}_features")
            known = {k: inputs[k] for k in inspect.signature(encode).parameters if k != "kwargs" and inputs.get(k) is not None}
            used |= set(known)
            visual = ids == self._placeholder(modality)
            outputs[modality], new = self._modality(modality, encode, known, visual, inputs)
            sizes[visual] = new.to(sizes.device)
        for name in used:
            inputs.pop(name)
        return outputs

    def _placeholder(self, modality: str) -> int:
        return int(getattr(self.model.config, f"{modality}_token_id"))

    def _modality(
        self, modality: str, encode: Any, known: dict[str, Any], visual: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[Any, torch.Tensor]:
        """One modality's encoder output with fewer tokens, and the sizes of its placeholders, 0 for those that are gone."""
        begin = time.perf_counter()
        watch = Watch(self.tower, self.needs)
        merging = Merging(self.tower, self.inside[0].do, self._layers()) if self.inside else None  # type: ignore[arg-type]
        with watch.encoding() if merging is None else merging.encoding():
            encoded = encode(**known, return_dict=True)
        encoded_at = time.perf_counter()
        before, layouts = self._tokens(encoded, visual, known, watch, inputs)
        if int(visual.sum()) != len(before):
            raise ValueError(
                f"reduce: expected one {modality} placeholder per visual token, got {int(visual.sum())} for {len(before)}"
            )
        tokens, plan = before, Plan.keeping(before, torch.ones(len(before), dtype=torch.bool, device=before.x.device))
        for stage, step in zip(self.report.stages, (*self.inside, *self.after), strict=True):
            inside = merging is not None and step.at == "vision"
            later = self._merged(tokens, layouts, merging.cluster) if inside else step.do.plan(tokens)  # type: ignore[union-attr]
            stage.tokens_in, stage.tokens_out = stage.tokens_in + len(tokens), stage.tokens_out + later.new
            tokens, plan = later.apply(tokens), plan.then(later)
        _write(encoded, tokens, rows=len(visual), expansion=self.expansion)
        self._record(before, plan)
        self.traces[modality] = Trace(before, plan)
        sizes = torch.zeros(plan.old, device=plan.anchor.device)
        sizes[plan.anchor] = standing_for(before, plan) if self.proportional else 1.0
        self.report.encode_seconds += encoded_at - begin
        self.report.reduce_seconds += time.perf_counter() - encoded_at
        return encoded, sizes

    def _record(self, before: Tokens, plan: Plan) -> None:
        new = [b - a for a, b in zip(plan.images, plan.images[1:], strict=False)]
        if any(m == 0 < n for m, n in zip(new, before.counts(), strict=True)):
            raise ValueError(
                "reduce: expected a recipe that keeps some token of each image, got one that dropped all of an image's"
            )
        self.report.images += before.images
        self.report.tokens_in += len(before)
        self.report.tokens_out += plan.new
        self.report.changed += sum(m < n for m, n in zip(new, before.counts(), strict=True))

    def _tokens(
        self, encoded: Any, visual: torch.Tensor, known: dict[str, Any], watch: Watch, inputs: dict[str, Any]
    ) -> tuple[Tokens, list[Layout]]:
        """The tokens of all images, with their places and what the recipe wants to know of them."""
        rows = list(encoded.pooler_output)
        if self.family.runs:
            rows = _joined(rows, visual)
        layouts = self.family.layout(self.model, known, [len(f) for f in rows])
        place = torch.cat([layout.place for layout in layouts])
        signals = watch.read(layouts, self._order(known))
        if Text() in self.needs:
            signals[Text()] = self._likeness(torch.cat(rows), visual, inputs)
        side = [torch.cat(list(level)) for level in getattr(encoded, "deepstack_features", None) or ()]
        video = [layout.video for layout in layouts]
        tokens = Tokens.of(rows, place=place, protected=place[:, 1] < 0, side=side, signals=signals, video=video)
        return tokens, layouts

    def _merged(self, tokens: Tokens, layouts: list[Layout], cluster: torch.Tensor | None) -> Plan:
        """The plan that leaves one token of all whose patches the tower merged, at the place of the first."""
        own = torch.arange(len(tokens), device=tokens.x.device)
        if cluster is None:
            return Plan.assigning(tokens, own)
        patches = torch.cat([layout.patches[:, 0] for layout in layouts]).to(own.device)
        label = torch.where(patches < 0, cluster.numel() + own, cluster.flatten().to(own.device)[patches])
        _, label = torch.unique(label, return_inverse=True)
        first = own.new_full((len(own),), len(own)).scatter_reduce(0, label, own, "amin")
        return Plan.assigning(tokens, first[label])

    def _order(self, known: dict[str, Any]) -> torch.Tensor | None:
        """Qwen2.5-VL's tower works on patches in the order of its windows: the patch at each place."""
        if not hasattr(self.tower, "permute_input_for_window_attn"):
            return None
        from transformers.vision_utils import get_vision_window_index

        grid = known["video_grid_thw"] if "video_grid_thw" in known else known["image_grid_thw"]
        tower, unit = self.tower, self.tower.spatial_merge_size**2
        index, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        order: torch.Tensor = (index[:, None] * unit + torch.arange(unit, device=index.device)).flatten()
        return order

    def _likeness(self, x: torch.Tensor, visual: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """(N,) mean cosine of each visual token with the embeddings of the text in its row of the batch."""
        other = torch.zeros_like(visual)
        for modality in _PIXELS:
            if hasattr(self.model.config, f"{modality}_token_id"):
                other |= inputs["input_ids"] == self._placeholder(modality)
        text = ~other & inputs["attention_mask"].bool()
        embedded = self.model.get_input_embeddings()(inputs["input_ids"].masked_fill(other, 0)).float()
        unit = torch.nn.functional.normalize(embedded, dim=-1) * text[..., None]
        mean = unit.sum(1) / text.sum(1, keepdim=True).clamp_min(1)
        likeness: torch.Tensor = torch.nn.functional.normalize(x.float(), dim=-1) * mean[visual.nonzero()[:, 0]].to(x.device)
        return likeness.sum(-1)


def standing_for(before: Tokens, plan: Plan) -> torch.Tensor:
    """(M,) float32: how many old tokens each new one stands for, all of them together for all.

    A token that went into several counts in equal parts; one that was dropped counts where it is most alike, in its image.
    """
    source = plan.source.long()
    times = torch.bincount(source, minlength=plan.old)
    sizes = plan.sums(1 / times.clamp_min(1).float())
    gone = times == 0
    if bool(gone.any()):
        there = torch.zeros_like(gone)
        there[plan.anchor] = True
        into = nearest(before, before.x, gone, there & ~before.protected, Image())
        row = torch.empty_like(into)
        row[plan.anchor] = torch.arange(plan.new, device=row.device)
        sizes += torch.bincount(row[into[gone]], minlength=plan.new)
    return sizes


def _joined(tiles: list[torch.Tensor], visual: torch.Tensor) -> list[torch.Tensor]:
    """Tiles → images: the tiles whose placeholders follow one another without a gap."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff(dim=1)
    runs = ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()
    x, first, images = torch.cat(tiles), 0, []
    for n in runs:
        images.append(x[first : first + n])
        first += n
    if first != len(x):
        raise ValueError(f"reduce: expected one placeholder per visual token, got {first} for {len(x)}")
    return images


def _write(encoded: Any, tokens: Tokens, *, rows: int, expansion: int) -> None:
    """The reduced features in place of the encoder's, in the container that the model expects.

    Raises:
        ValueError: the model takes one tensor, which cannot say how many tokens each of several images has, and ``generate``
            would have to repeat them.
    """
    split = list(tokens.x.split(tokens.counts()))
    if not isinstance(encoded.pooler_output, torch.Tensor):
        encoded.pooler_output = split
    elif len(set(tokens.counts())) == 1:
        encoded.pooler_output = torch.stack(split)
    elif expansion > 1 and rows > 1:
        raise ValueError(
            "reduce: this model takes its images as one tensor, so that beams over a batch need the same number of tokens "
            f"from each, got {tokens.counts()}; generate row by row, or use a method with a fixed budget"
        )
    else:
        encoded.pooler_output = tokens.x[None]
    if tokens.side:
        encoded.deepstack_features = [list(level.split(tokens.counts())) for level in tokens.side]
