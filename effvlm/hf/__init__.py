"""Where in a Hugging Face model things happen: families, extension points."""

from effvlm.hf.enable import disable, enable
from effvlm.hf.enable_report import EnableReport
from effvlm.hf.hub_kernels import register_kernels
from effvlm.hf.mixers import replace_classes, restore_classes
from effvlm.hf.reduce import Reducer, reduce

__all__ = ["EnableReport", "Reducer", "disable", "enable", "reduce", "register_kernels", "replace_classes", "restore_classes"]
