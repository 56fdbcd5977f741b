"""What :func:`effvlm.enable` did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EnableReport:
    """What :func:`effvlm.enable` did.

    Attributes:
        modules: name of each module that now runs our kernels → which, and how.
        fallbacks: name of each module that could and does not → why.
    """

    modules: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.modules and not self.fallbacks:
            nothing = "no routed experts, Mamba-like mixers or large linear layers on the CPU"
            return f"effvlm.enable: this model has {nothing}; nothing to do"
        lines = [f"effvlm.enable: {len(self.modules)} modules run effvlm kernels, {len(self.fallbacks)} do not"]
        for sign, found in (("+", self.modules), ("-", self.fallbacks)):
            for what in dict.fromkeys(found.values()):
                names = [name for name, text in found.items() if text == what]
                lines.append(f"  {sign} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}")
        return "\n".join(lines)
