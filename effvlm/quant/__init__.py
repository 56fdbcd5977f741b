"""Few-bit weights: matrices of trits at any rate from 0.4 to 1.6 bits per weight."""

from effvlm.quant.allocate import allocate, probe
from effvlm.quant.base import Quantized, TernaryRecipe
from effvlm.quant.gram import Gram
from effvlm.quant.quantizer import quantize
from effvlm.quant.rate import bits_per_weight

__all__ = ["Gram", "Quantized", "TernaryRecipe", "allocate", "bits_per_weight", "probe", "quantize"]
