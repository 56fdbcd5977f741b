"""Where in a Hugging Face model things happen: families, extension points."""

from effvlm.hf.experts import EnableReport, disable, enable
from effvlm.hf.reduce import Reducer, reduce

__all__ = ["EnableReport", "Reducer", "disable", "enable", "reduce"]
