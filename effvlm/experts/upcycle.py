"""Upcycle dense models into mixtures of experts.

Komatsuzaki et al., "Sparse Upcycling" (arXiv 2212.05055); Zhang et al., "CLIP-MoE" (arXiv 2409.19291).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from effvlm.experts import siblings, tower
from effvlm.experts.report import Report, parameters

_FFN = re.compile(r".*\bmlp\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|bias)")


class UpcycleReport(Report):
    """What :func:`upcycle` did; ``model`` is the mixture."""

    def notes(self) -> list[str]:
        if any(isinstance(m, tower.TowerMoE) for m in self.model.modules()):
            return ["transformers has no class for it: save and load by effvlm.experts.tower"]
        return [f"a {type(self.model).__name__}: saves and loads as any other"]


def _check_equal(models: Sequence[Any], tolerance: float) -> None:
    """Raise unless all models agree in everything but the feed-forwards."""
    first = models[0].state_dict()
    for at, other in enumerate(models[1:], 1):
        theirs = other.state_dict()
        if type(other) is not type(models[0]) or theirs.keys() != first.keys():
            odd = sorted(first.keys() ^ theirs.keys())
            raise ValueError(
                f"upcycle: expected models of one kind, got {type(models[0]).__name__} and {type(other).__name__}"
                + (f", of which one only has {odd[0]}" if odd else "")
            )
        for name, value in first.items():
            shape = theirs[name].shape == value.shape
            if not shape or (not _FFN.fullmatch(name) and not _close(value, theirs[name], tolerance)):
                how = f"by {float((value.float() - theirs[name].float()).abs().max()):.3g}" if shape else "in shape"
                raise ValueError(
                    f"upcycle: expected models that differ in feed-forwards only, got {name}, different {how} in model {at}"
                )


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return torch.equal(a, b) if tolerance == 0 else bool(((a.float() - b.float()).abs() <= tolerance).all())


def _check_numbers(models: Any, experts: int | None, top_k: int, router_std: float, tolerance: float) -> tuple[list[Any], int]:
    """The models, and how many experts there will be."""
    listed = list(models) if isinstance(models, Sequence) else [models]
    if not listed or not all(isinstance(m, torch.nn.Module) for m in listed):
        kinds = ", ".join(type(m).__name__ for m in listed)
        raise TypeError(f"upcycle: expected a Hugging Face model or a list of them, got {kinds or 'an empty list'}")
    if experts is None and len(listed) == 1:
        raise ValueError("upcycle: expected the number of experts for a single model, got None")
    E = len(listed) if experts is None else experts
    if isinstance(E, bool) or not isinstance(E, int) or E < 2 or (len(listed) > 1 and len(listed) != E):
        wanted = f"{len(listed)}, one per model" if len(listed) > 1 else "at least 2"
        raise ValueError(f"upcycle: expected experts to be {wanted}, got {E}")
    if not 1 <= top_k <= E:
        raise ValueError(f"upcycle: expected top_k between 1 and {E}, got {top_k}")
    if router_std < 0 or tolerance < 0:
        raise ValueError(f"upcycle: expected router_std >= 0 and tolerance >= 0, got {router_std} and {tolerance}")
    return listed, E


def upcycle(
    models: Any,
    experts: int | None = None,
    *,
    top_k: int = 2,
    router_std: float = 0.02,
    seed: int = 0,
    tolerance: float = 0.0,
) -> UpcycleReport:
    """Make a mixture of experts whose experts are the feed-forwards of dense models, with a new random router.

    ::

        moe = effvlm.experts.upcycle(qwen3, experts=8).model            # eight copies, to be trained apart
        clip = effvlm.experts.upcycle([clip_a, clip_b, clip_c]).model   # CLIP-MoE: one expert per checkpoint

    One model gives ``experts`` copies of its feed-forward: the outputs are the dense model's up to rounding, since the weights of
    a token's choices sum to 1, until training tells the copies apart. Several that were fine-tuned from one checkpoint with
    everything but the feed-forward frozen (CLIP-MoE's diversified multiplet upcycling) give one expert each; the router must be
    trained then.

    Decoders become the class of transformers with the same layout: Qwen3 → Qwen3-MoE, Qwen3-VL → Qwen3-VL-MoE, Mistral and Llama
    → Mixtral, Granite → GraniteMoE; that is a new model (memory for both), saved and loaded as any other. CLIP, SigLIP and others
    with the same feed-forward have no such class: all their feed-forwards are replaced, in the first model, by modules that run
    :func:`effvlm.moe_ffn`. Pass a part (``clip.vision_model``) to change only that. ``save_pretrained`` of the model passed then
    refuses, because ``from_pretrained`` would fill the experts with random weights; save and load it by
    :func:`effvlm.experts.tower.save` and :func:`effvlm.experts.tower.load`. Of a model around the part passed it does not know:
    save that by ``tower.save``, too.

    Args:
        models: a Hugging Face model, or several.
        experts: how many copies of a single model's feed-forward.
        top_k: experts per token.
        router_std: standard deviation of the router's rows; 0 for zeros (all experts then tie, for every token).
        seed: of the router.
        tolerance: largest difference allowed between weights that models have to share; the first model's are taken.

    Returns:
        The report; its ``model`` is the mixture, in eval mode.

    Raises:
        ValueError: a class with neither a sibling nor such feed-forwards, models that differ elsewhere (the first such weight is
            named), a config field without counterpart, or numbers that do not fit. Nothing has changed then.
        TypeError: not a model.
    """
    listed, E = _check_numbers(models, experts, top_k, router_std, tolerance)
    first, before = listed[0], parameters(listed[0])
    found, mlps = siblings.find(first, dense=True), tower.feed_forwards(first)
    if found is None and not mlps:
        names = ", ".join(pair.dense for pair in siblings.SIBLINGS)
        raise ValueError(
            f"upcycle: expected a model of {names}, or one with feed-forwards of CLIP's kind (mlp.fc1, mlp.fc2), got "
            f"{type(first).__name__}"
        )
    _check_equal(listed, tolerance)
    generator = torch.Generator().manual_seed(seed)

    def router(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * router_std

    if found is not None:
        made = _decoder(listed, E, top_k, router, *found)
        modules = tuple(n for n, m in made.named_modules() if n.endswith(f".{found[0].block}.experts"))
    else:
        made = _tower(listed, E, top_k, router, mlps)
        modules = tuple(f"{name}.experts" for name in mlps)
    return UpcycleReport("upcycle", modules, (before, parameters(made)), ("1 (dense)", str(E)), made)


def _decoder(listed: list[Any], E: int, top_k: int, router: Callable[..., torch.Tensor], pair: siblings.Sibling, cls: Any) -> Any:
    def extra(config: Any, fields: set[str]) -> dict[str, Any]:
        if pair.count not in fields:
            return {}
        normalised = {pair.normalised: True} if pair.normalised else {}
        sizes = {pair.count: E, "num_experts_per_tok": top_k, pair.inner: config.intermediate_size}
        return {**sizes, **normalised, **pair.fields, "tie_word_embeddings": listed[0].config.tie_word_embeddings}

    config = siblings.convert("upcycle", listed[0].config, cls.config_class, extra)
    made = siblings.build("upcycle", listed[0], cls, config)
    held: list[dict[str, torch.Tensor]] = [dict(m.named_parameters()) for m in listed]
    block = re.compile(rf"(.*\.){pair.block}\.(experts\.gate_up_proj|experts\.down_proj|{pair.router}\.weight)")

    def value(name: str) -> torch.Tensor:
        part = block.fullmatch(name)
        if part is None:
            return held[0][name]
        mlp, sources = f"{part[1]}mlp.", (held * E)[:E]
        if part[2].endswith("down_proj"):
            return torch.stack([h[f"{mlp}down_proj.weight"] for h in sources])
        if part[2].endswith("gate_up_proj"):
            return torch.stack([torch.cat((h[f"{mlp}gate_proj.weight"], h[f"{mlp}up_proj.weight"])) for h in sources])
        return router(E, held[0][f"{mlp}gate_proj.weight"].shape[1])

    siblings.fill("upcycle", made, value)
    return made


@torch.no_grad()
def _tower(listed: list[Any], E: int, top_k: int, router: Callable[..., torch.Tensor], mlps: dict[str, Any]) -> Any:
    made = {}
    for name, mlp in mlps.items():
        act, alpha = tower.activation_of("upcycle", mlp)
        inner, hidden = mlp.fc1.weight.shape
        moe = tower.TowerMoE(E, top_k, hidden, inner, mlp.fc1.bias is not None, act, alpha).to(mlp.fc1.weight)
        moe.router.weight.copy_(router(E, hidden))
        sources = [m.get_submodule(name) for m in (listed * E)[:E]]
        for ours, theirs in (("up_proj", "fc1"), ("down_proj", "fc2")):
            getattr(moe.experts, ours).copy_(torch.stack([getattr(s, theirs).weight for s in sources]))
            if moe.experts.has_bias:
                getattr(moe.experts, f"{ours}_bias").copy_(torch.stack([getattr(s, theirs).bias for s in sources]))
        made[name] = moe.eval()
    for name, moe in made.items():
        tower.put(listed[0], name, moe)
    tower.guard(listed[0])
    return listed[0].eval()
