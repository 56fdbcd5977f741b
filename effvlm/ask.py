"""``effvlm run``: one picture, one question, any supported model."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console

from effvlm import demo
from effvlm.hf import reduce
from effvlm.tokens import Method


def open_image(path: Path) -> Image.Image:
    """A picture file as RGB, turned the way its camera says.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not an image.
    """
    from PIL import ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"expected an image file, found none at {path}")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image that Pillow can read, got {path} ({error})") from error


def load_model(name: str | None) -> tuple[Any, Any]:
    """(model, processor) of a folder or hub id; None is the demo VLM.

    Raises:
        ValueError: not a model, or one of a type that transformers does not know as image-text-to-text.
    """
    if name is None:
        return demo.load()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"expected a model folder with a config.json, got {name}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        return model.eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"expected an image-text-to-text model that transformers can load, got {name!r}: {first}") from error


def inputs_of(processor: Any, picture: Image.Image, prompt: str) -> Any:
    """A processor's inputs for one picture and one question, by its chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        prompt = f"{processor.image_token}\n{prompt}"
    return processor(images=[picture], text=[prompt], return_tensors="pt")


def answer(
    notes: Console,
    *,
    image: Path,
    prompt: str,
    model: str | None,
    method: Method | None,
    max_new_tokens: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """The answer with what it took: ``answer``, ``visual_tokens_in``, ``visual_tokens_out``, ``seconds`` of ``generate``."""
    picture = open_image(image)
    if trace is not None and method is None:
        raise ValueError(
            "run: expected --keep below 1 or a --recipe together with --trace, which draws what became of the tokens"
        )
    with notes.status("loading the model"):
        vlm, processor = load_model(model)
    reducer = reduce(vlm, method) if method else None  # whole, any model will do
    inputs = inputs_of(processor, picture, prompt).to(vlm.device, vlm.dtype)  # the dtype for what is floating-point
    with notes.status("looking"), torch.no_grad(), reducer or nullcontext():
        start = time.perf_counter()
        out = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - start
    if trace is not None and reducer is not None:
        reducer.trace(picture).save(trace)
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    tokens = int((inputs["input_ids"] == getattr(vlm.config, "image_token_id", -1)).sum())
    return {
        "answer": text,
        "visual_tokens_in": tokens,
        "visual_tokens_out": reducer.report.tokens_out if reducer else tokens,
        "seconds": seconds,
    }
