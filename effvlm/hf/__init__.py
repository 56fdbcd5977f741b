"""Where in a Hugging Face model things happen: families, extension points."""

from effvlm.hf.reduce import Reducer, reduce

__all__ = ["Reducer", "reduce"]
