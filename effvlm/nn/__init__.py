"""Mixers of tokens in linear time that transformers does not have, on effvlm's scans: drop-ins for attention in vision models."""

from effvlm.nn.gated_conv import GatedConv
from effvlm.nn.mlstm import mlstm
from effvlm.nn.retention import Retention
from effvlm.nn.spectral_mixer import SpectralMixer
from effvlm.nn.ssm_mixer import SSMMixer
from effvlm.nn.vim_mixer import VimMixer
from effvlm.nn.vision_scan import VisionScan2d

__all__ = ["GatedConv", "Retention", "SSMMixer", "SpectralMixer", "VimMixer", "VisionScan2d", "mlstm"]
