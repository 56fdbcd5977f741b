"""Attention layers of a trained Hugging Face model turned into layers of constant state (mmMamba), and taught to be as good."""

from effvlm.convert.attention import SSMAttention, attention_to_ssm
from effvlm.convert.distill import Distilled, distill

__all__ = ["Distilled", "SSMAttention", "attention_to_ssm", "distill"]
