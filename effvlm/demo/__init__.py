"""A small vision-language model that ships with effvlm: the project's measure of quality."""

from effvlm.demo.evaluation import Sample, answer, evaluate, load, prompt, samples

__all__ = ["Sample", "answer", "evaluate", "load", "prompt", "samples"]
