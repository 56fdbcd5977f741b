"""What a recipe for ternary weights is, and what quantising with it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

BITS_MIN, BITS_MAX = 0.4, 1.6  # targets that the format serves, in bits per weight


@dataclass(frozen=True)
class TernaryRecipe:
    """How to make trits of matrices of weights.

    Args:
        target_bits: bits per weight of what is stored, row scales and all metadata included; in [0.4, 1.6].
        method: ``"gptq"`` measures errors under the inputs' Hessian, ``"rtn"`` rounds to nearest without any, ``"minmax"`` is
            QMoE's grid inside GPTQ (arXiv 2310.16795), whose rate is what falls out.
        levels: 3 for {−a, 0, a}, 5 for {−2a … 2a}, ``"auto"`` for what errs less at equal bits.
        damp: added to the Hessian's diagonal, as a share of its mean.
        shrink: further damping for few tokens: ``damp`` · (1 + ``shrink`` · channels / tokens).
        block: columns per matrix product.
        sweeps: annealed sweeps over all trits after GPTQ; 0 for GPTQ alone.
        iterations: rounds of coordinate descent and least-squares scale that follow; more where the rate asks for it.
        max_tokens_factor: tokens of one expert that are looked at, at most, as a multiple of the mean.
        min_tokens: experts with fewer are rounded to nearest.
        allocate: whether a pass over many matrices shares their bits out by :func:`~effvlm.quant.allocate` (the matrices of one
            :func:`~effvlm.quant.quantize` get ``target_bits`` each either way).

    Raises:
        ValueError: a value outside its range, named.
    """

    target_bits: float = 0.8
    method: Literal["gptq", "rtn", "minmax"] = "gptq"
    levels: Literal[3, 5, "auto"] = "auto"
    damp: float = 0.1
    shrink: float = 4.0
    block: int = 128
    sweeps: int = 6
    iterations: int = 2
    max_tokens_factor: float = 4.0
    min_tokens: int = 16
    allocate: bool = True

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("target_bits", _number(self.target_bits, BITS_MIN, BITS_MAX), f"a number in [{BITS_MIN}, {BITS_MAX}]"),
            ("method", self.method in ("gptq", "rtn", "minmax"), "'gptq', 'rtn' or 'minmax'"),
            ("levels", (_whole(self.levels, 3) and self.levels in (3, 5)) or self.levels == "auto", "3, 5 or 'auto'"),
            ("damp", _number(self.damp, 0, float("inf")), "a number ≥ 0"),
            ("shrink", _number(self.shrink, 0, float("inf")), "a number ≥ 0"),
            ("block", _whole(self.block, 1), "a whole number ≥ 1"),
            ("sweeps", _whole(self.sweeps, 0), "a whole number ≥ 0"),
            ("iterations", _whole(self.iterations, 1), "a whole number ≥ 1"),
            ("max_tokens_factor", _number(self.max_tokens_factor, 1, float("inf")), "a number ≥ 1"),
            ("min_tokens", _whole(self.min_tokens, 1), "a whole number ≥ 1"),
            ("allocate", isinstance(self.allocate, bool), "true or false"),
        ):
            if not valid:
                raise ValueError(f"TernaryRecipe: expected {name} to be {wanted}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads; plain numbers, strings and bools."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TernaryRecipe:
        """A recipe from some of its fields.

        Raises:
            ValueError: an unknown field, or a value outside its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"TernaryRecipe: expected fields among {', '.join(known)}; got {unknown[0]!r}")
        return cls(**values)


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most and value != float("inf")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Quantized:
    """B matrices as trits.

    Attributes:
        trits: (B, R, C) int8 in −1 … 1, or −2 … 2 where five levels were used.
        scales: (B, R) float32 whose values bfloat16 holds; weight = scale · trit.
        bits: (B,) float64, bits per weight stored (see :func:`~effvlm.quant.bits_per_weight`).
        error: (B,) float64, tr(D H Dᵀ) / tr(W H Wᵀ) of D = W − Q under the Hessian as given, undamped: the share of the output's
            energy that is lost. Equal to ``weight_error`` where there is no Hessian, or a zero one.
        weight_error: (B,) float64, ‖D‖² / ‖W‖².
        method: per matrix, ``"gptq"``, ``"rtn"`` or ``"minmax"``: whose trits these are.
        notes: per matrix, what did not go as asked, in words; empty if nothing.
    """

    trits: torch.Tensor
    scales: torch.Tensor
    bits: torch.Tensor
    error: torch.Tensor
    weight_error: torch.Tensor
    method: tuple[str, ...]
    notes: tuple[str, ...]

    def dequantized(self) -> torch.Tensor:
        """(B, R, C) float32."""
        return self.scales[:, :, None] * self.trits
