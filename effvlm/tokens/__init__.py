"""Visual tokens: methods that reduce them, one file each, for :func:`effvlm.reduce`, and the parts that methods are made of.

A method is a frozen dataclass; its ``steps()`` say where in the model which reduction happens. A reduction picks tokens (by
scores,
within groups, as many as a budget allows) and combines the others with them, or merges by matching, pooling or clustering; its
plan, a sparse map, moves everything that belongs to a token.
"""

from effvlm.tokens.acformer import AcFormer
from effvlm.tokens.aim import AIM
from effvlm.tokens.bvllm import BVLLM
from effvlm.tokens.cdpruner import CDPruner
from effvlm.tokens.dart import DART
from effvlm.tokens.divprune import DivPrune
from effvlm.tokens.dycoke import DyCoke
from effvlm.tokens.evs import EVS
from effvlm.tokens.fopru import FoPru
from effvlm.tokens.globalcom2 import GlobalCom2
from effvlm.tokens.hiprune import HiPrune
from effvlm.tokens.lftr import LFTR
from effvlm.tokens.mustdrop import MustDrop
from effvlm.tokens.pixelprune import PixelPrune
from effvlm.tokens.plan import Plan
from effvlm.tokens.pool import Pool
from effvlm.tokens.prumerge import PruMerge
from effvlm.tokens.prunevid import PruneVid
from effvlm.tokens.random import Random
from effvlm.tokens.semclip import SemClip
from effvlm.tokens.signals import Attention, Keys, Pixels, Text
from effvlm.tokens.slime import SliME
from effvlm.tokens.step import Method, Recipe, Select, Step, apply
from effvlm.tokens.stride import Stride
from effvlm.tokens.tokens import Tokens
from effvlm.tokens.tome import ToMe
from effvlm.tokens.visionzip import VisionZip
from effvlm.tokens.vscan import VScan

METHODS = (
    AIM,
    AcFormer,
    BVLLM,
    CDPruner,
    DART,
    DivPrune,
    DyCoke,
    EVS,
    FoPru,
    GlobalCom2,
    HiPrune,
    LFTR,
    MustDrop,
    PixelPrune,
    Pool,
    PruMerge,
    PruneVid,
    Random,
    SemClip,
    SliME,
    Stride,
    ToMe,
    VScan,
    VisionZip,
)
__all__ = [
    "AIM",
    "BVLLM",
    "DART",
    "EVS",
    "LFTR",
    "METHODS",
    "AcFormer",
    "Attention",
    "CDPruner",
    "DivPrune",
    "DyCoke",
    "FoPru",
    "GlobalCom2",
    "HiPrune",
    "Keys",
    "Method",
    "MustDrop",
    "PixelPrune",
    "Pixels",
    "Plan",
    "Pool",
    "PruMerge",
    "PruneVid",
    "Random",
    "Recipe",
    "Select",
    "SemClip",
    "SliME",
    "Step",
    "Stride",
    "Text",
    "ToMe",
    "Tokens",
    "VScan",
    "VisionZip",
    "apply",
]
