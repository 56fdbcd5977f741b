"""VScan's vision half: a global and a local scan, the rest merged (arXiv 2505.22654)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import FillTo, Keep, check_keep
from effvlm.tokens.combines import Nearest
from effvlm.tokens.groups import Window
from effvlm.tokens.picks import Top, Union
from effvlm.tokens.scores import Signalled
from effvlm.tokens.signals import Attention
from effvlm.tokens.step import Select, Step


@dataclass(frozen=True)
class VScan:
    """Half of the budget by window, from a shallow layer's CLS attention; half from a late layer's; the rest joins its nearest.

    The second pruning inside the language model is not part of this.

    Args:
        keep: share of the tokens to keep, in (0, 1].
        window: side of the windows.
        shallow, late: the layers; 0.21 of the depth is layer 5 of CLIP-L's 24.
    """

    keep: float = 0.25
    window: int = 6
    shallow: int | float = 0.21
    late: int | float = -2

    def __post_init__(self) -> None:
        check_keep("VScan", self.keep)

    def steps(self) -> tuple[Step, ...]:
        local = Top(Signalled(Attention(self.shallow)), Keep(self.keep / 2, least=0), Window(self.window, self.window))
        return (Step(Select(Union((local, Top(Signalled(Attention(self.late)), FillTo(self.keep)))), Nearest())),)
