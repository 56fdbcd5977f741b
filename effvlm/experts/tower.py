"""A mixture of experts in place of the feed-forwards of a tower (CLIP, SigLIP), for which transformers has no class."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from effvlm.ops.moe_ffn import ACTS, activation, moe_ffn
from effvlm.ops.moe_route import moe_route

FORMAT = 1


class TowerExperts(torch.nn.Module):
    """Feed-forwards without a gate, for tokens that are already routed; runs :func:`effvlm.moe_ffn`.

    The layout is the one that transformers' registry of experts uses.
    """

    has_gate, is_transposed, is_concatenated = False, False, True

    def __init__(self, num_experts: int, hidden: int, inner: int, has_bias: bool, act: str, alpha: float) -> None:
        super().__init__()
        self.num_experts, self.has_bias, self.act, self.alpha = num_experts, has_bias, act, alpha
        self.up_proj = torch.nn.Parameter(torch.empty(num_experts, inner, hidden))
        self.down_proj = torch.nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.up_proj_bias = torch.nn.Parameter(torch.empty(num_experts, inner)) if has_bias else None
        self.down_proj_bias = torch.nn.Parameter(torch.empty(num_experts, hidden)) if has_bias else None

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """(T, H) states, (T, K) int64 experts and their float32 weights → (T, H)."""
        given: dict[str, Any] = {
            "up_bias": self.up_proj_bias,
            "down_bias": self.down_proj_bias,
            "act": self.act,
            "alpha": self.alpha,
        }
        return moe_ffn(hidden_states, top_k_index, top_k_weights, self.up_proj, self.down_proj, gated=False, **given)


class TowerMoE(torch.nn.Module):
    """A linear router and :class:`TowerExperts`: softmax over all experts, the best ``top_k``, weights that sum to 1."""

    def __init__(self, num_experts: int, top_k: int, hidden: int, inner: int, has_bias: bool, act: str, alpha: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = torch.nn.Linear(hidden, num_experts, bias=False)
        self.experts = TowerExperts(num_experts, hidden, inner, has_bias, act, alpha)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, H) → (…, H)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = moe_route(self.router(flat), self.top_k, renormalize=True)
        made: torch.Tensor = self.experts(flat, ids, weights)
        return made.view(hidden_states.shape)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        e = self.experts
        sizes = {"num_experts": e.num_experts, "top_k": self.top_k, "hidden": e.up_proj.shape[2], "inner": e.up_proj.shape[1]}
        return {**sizes, "has_bias": e.has_bias, "act": e.act, "alpha": e.alpha}


def feed_forwards(model: torch.nn.Module) -> dict[str, Any]:
    """Name → module of every feed-forward ``fc2(act(fc1(x)))`` in an encoder layer of CLIP's kind."""
    kind = {"fc1", "fc2", "activation_fn"}
    return {
        name: m
        for name, m in model.named_modules()
        if name.rpartition(".")[2] == "mlp" and {n for n, _ in m.named_children()} == kind and isinstance(m.fc1, torch.nn.Linear)
    }


def activation_of(method: str, mlp: Any) -> tuple[str, float]:
    """(act, alpha) of :func:`effvlm.moe_ffn` that compute a module's ``activation_fn``, found by trying.

    Raises:
        ValueError: none does.
    """
    x = torch.linspace(-6, 6, 101)
    wanted = mlp.activation_fn(x)
    options = [(act, 1.0) for act in ACTS] + [("silu", 1.702)]  # the last is CLIP's quick_gelu
    for act, alpha in options:
        if torch.allclose(activation(x, act, alpha), wanted, rtol=1e-4, atol=1e-5):
            return act, alpha
    raise ValueError(
        f"{method}: expected an activation that effvlm.moe_ffn has ({', '.join(ACTS)}, quick_gelu), got {mlp.activation_fn}"
    )


def put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Set a submodule by its full name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise TypeError(
        f"save_pretrained: {type(self).__name__} has no experts in transformers, so from_pretrained would replace them by random "
        "weights; use effvlm.experts.tower.save(model, folder) and load(folder)"
    )


def guard(model: Any) -> None:
    """Make ``save_pretrained`` of this instance say why it cannot work."""
    model.save_pretrained = MethodType(_refuse, model)


def save(model: Any, folder: str | Path) -> None:
    """Write an upcycled tower (or a model with one in it): ``config.json``, ``experts.json`` and ``model.safetensors``.

    ::

        from effvlm.experts import tower
        tower.save(model, "clip-moe")
        model = tower.load("clip-moe")

    Raises:
        ValueError: the model has no :class:`TowerMoE`.
    """
    from safetensors.torch import save_model

    layers = {name: m.settings() for name, m in model.named_modules() if isinstance(m, TowerMoE)}
    if not layers:
        raise ValueError(f"save: expected a tower upcycled by effvlm.experts.upcycle, got {type(model).__name__} without experts")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    text = {"format": FORMAT, "class": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch."), "layers": layers}
    (folder / "experts.json").write_text(json.dumps(text, indent=1))
    save_model(model, str(folder / "model.safetensors"))


def load(folder: str | Path) -> Any:
    """The model that :func:`save` wrote, in eval mode on the CPU.

    Raises:
        ValueError: a folder of another format, or a class that the installed transformers lacks.
        RuntimeError: weights that do not fit.
    """
    import transformers
    from safetensors.torch import load_model

    text = json.loads((Path(folder) / "experts.json").read_text())
    cls = getattr(transformers, text["class"], None)
    if text["format"] != FORMAT or cls is None:
        raise ValueError(f"load: expected format {FORMAT} and a class of transformers, got {text['format']} and {text['class']}")
    model = cls(cls.config_class.from_pretrained(folder)).to(getattr(torch, text["dtype"]))
    for name, settings in text["layers"].items():
        put(model, name, TowerMoE(**settings).to(model.dtype))
    load_model(model, str(Path(folder) / "model.safetensors"))
    guard(model)
    return model.eval()
