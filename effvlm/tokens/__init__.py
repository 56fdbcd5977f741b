"""Token-reduction methods: one frozen dataclass each, for :func:`effvlm.reduce`."""

from effvlm.tokens.base import Method, Tokens
from effvlm.tokens.stride import Stride
from effvlm.tokens.tome import ToMe

__all__ = ["Method", "Stride", "ToMe", "Tokens"]
