"""Passes over routed experts: measure their use, drop, merge, average and add them, and make them from dense models."""

from effvlm.experts.average import AverageReport, average
from effvlm.experts.drop import DropReport, drop
from effvlm.experts.extend import ExtendReport, extend
from effvlm.experts.merge import MergeReport, merge
from effvlm.experts.report import Report
from effvlm.experts.upcycle import UpcycleReport, upcycle
from effvlm.experts.usage import Usage, usage

__all__ = [
    "AverageReport",
    "DropReport",
    "ExtendReport",
    "MergeReport",
    "Report",
    "UpcycleReport",
    "Usage",
    "average",
    "drop",
    "extend",
    "merge",
    "upcycle",
    "usage",
]
