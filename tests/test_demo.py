"""The demo VLM is the measure of quality: what it is, what it was never shown, and that it is as good as its card says."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import effvlm
from effvlm import demo
from effvlm.demo.questions import KINDS, vocabulary
from effvlm.demo.scenes import COLORS, GRID, PLACES, SHAPES, Scene, Thing, draw_scene, held_out_scans, render, training_scans
from effvlm.tokens import Stride, ToMe

PACKAGE = Path(demo.__file__).parent
CARD = PACKAGE / "model" / "README.md"
ASKED = {"what color": "color", "what shape": "shape", "which digit": "digit", "how big": "size"}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return demo.load()


def scenes(n: int) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng) for _ in range(n)]


# ---- pictures and questions ----


def test_no_scan_is_both_trained_on_and_asked_about() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    shown, kept = ({image.tobytes() for image in s.images} for s in (training_scans(), held_out_scans()))
    assert len(held_out_scans().labels) == 360
    assert len(training_scans().labels) == 1437
    assert not shown & kept


def test_samples_are_the_same_every_time_and_differ_by_seed() -> None:
    first, again, other = demo.samples(24), demo.samples(24), demo.samples(24, seed=1)
    assert [(s.question, s.answer, s.image.tobytes()) for s in first] == [
        (s.question, s.answer, s.image.tobytes()) for s in again
    ]
    assert [s.image.tobytes() for s in first] != [s.image.tobytes() for s in other]
    assert Counter(s.kind for s in first) == dict.fromkeys(KINDS, 3)


def truth(scene: Scene, question: str) -> str:
    """The answer, by another way than questions.py: from the words of the question."""
    words = question.removesuffix(" ?")
    named = {n: i for i, t in scene.things() for n in (t.name, t.name.split()[1], f"{t.color} thing")}
    if at := re.fullmatch(r"(?:what color is the thing|what shape is|which digit is|how big is the shape) at the (.+)", words):
        thing = scene.cells[PLACES.index(at[1])]
        assert thing is not None
        return str(next(getattr(thing, name) for start, name in ASKED.items() if words.startswith(start)))
    if of := re.fullmatch(r"how many (\w+) things are there", words):
        return str(sum(t.color == of[1] for _, t in scene.things()))
    if a := re.fullmatch(r"is there a (.+)", words):
        return "yes" if a[1] in named else "no"
    if the := re.fullmatch(r"where is the (.+)", words):
        return PLACES[named[the[1]]]
    side = re.fullmatch(r"what is (left of|right of|above|below) the (.+)", words)
    assert side, question
    step = {"left of": -1, "right of": 1, "above": -GRID, "below": GRID}[side[1]]
    thing = scene.cells[named[side[2]] + step]
    return thing.name if thing else "nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind: str) -> None:
    rng, seen = np.random.default_rng(3), Counter[str]()
    for scene in scenes(200):
        if asked := KINDS[kind](scene, rng):
            assert asked.answer == truth(scene, asked.text)
            seen[asked.answer] += 1
    assert sum(seen.values()) > 120
    assert max(seen.values()) < 0.65 * sum(seen.values())  # no answer so common that guessing pays


def test_names_in_questions_are_unique_or_enough() -> None:
    twins = (Thing("red", "circle", "small"), None, Thing("red", "circle", "large")) + (None,) * 6
    scene = Scene(twins, 1)
    rng = np.random.default_rng(0)
    assert KINDS["where"](scene, rng) is None
    assert KINDS["relation"](scene, rng) is None
    assert KINDS["digit"](scene, rng) is None


def test_the_vocabulary_has_every_word() -> None:
    rng, words = np.random.default_rng(1), set(vocabulary())
    for scene in scenes(150):
        for kind in KINDS.values():
            if asked := kind(scene, rng):
                assert set(f"{asked.text} {asked.answer}".split()) <= words


def test_pictures_show_what_the_scene_says() -> None:
    for color, rgb in COLORS.items():
        for shape in SHAPES:
            cells = (None,) * 4 + (Thing(color, shape, "large"),) + (None,) * 4
            picture = np.asarray(render(Scene(cells, 7), held_out_scans())).astype(int)
            distance = np.abs(picture - rgb).sum(2) < 75
            assert distance[32:64, 32:64].mean() > 0.08
            outside = distance.copy()
            outside[32:64, 32:64] = False
            assert outside.sum() == 0


# ---- the model ----


def test_the_architecture_exercises_every_kernel_family(loaded: tuple[Any, Any]) -> None:
    config = loaded[0].config
    text, vision = config.text_config, config.vision_config
    assert (config.model_type, text.model_type) == ("llava", "granitemoehybrid")
    assert set(text.layer_types) == {"linear_attention", "full_attention"}
    assert (text.num_local_experts, text.num_experts_per_tok) == (16, 2)
    assert (vision.image_size // vision.patch_size) ** 2 == config.image_seq_length == 144
    assert 2e6 < sum(p.numel() for p in loaded[0].parameters()) < 8e6


def test_the_package_stays_small() -> None:
    assert sum(p.stat().st_size for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc") < 10e6


def test_it_is_as_good_as_its_card_says(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    result = demo.evaluate(model, 240, processor=processor)
    claimed = float(re.search(r"overall \| 2000 \| ([\d.]+) %", CARD.read_text())[1])  # type: ignore[index]
    assert claimed >= 95
    assert result["accuracy"] >= 0.93  # 95 % within the error of 240 questions
    assert min(k["accuracy"] for k in result["kinds"].values()) >= 0.8  # 90 % within the error of 30 each
    assert result["right"] == sum(k["right"] for k in result["kinds"].values())
    blind = demo.evaluate(model, 160, processor=processor, blind=True)
    assert blind["accuracy"] < 0.35


def test_the_batch_does_not_change_answers(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    some = demo.samples(16)
    together = demo.answer(model, processor, [s.image for s in some], [s.question for s in some])
    alone = [demo.answer(model, processor, [s.image], [s.question])[0] for s in some]
    assert together == alone


def test_reduction_costs_little_and_less_than_a_blind_choice(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    state = {k: v.clone() for k, v in model.state_dict().items()}
    right = {}
    for method in (ToMe(keep=0.5), Stride(keep=0.25), ToMe(keep=0.25)):
        with effvlm.reduce(model, method) as reducer:
            right[method] = demo.evaluate(model, 160, processor=processor)["accuracy"]
        assert reducer.report.tokens_out == method.keep * reducer.report.tokens_in
    assert right[ToMe(keep=0.5)] > 0.8
    assert right[ToMe(keep=0.25)] > right[Stride(keep=0.25)] - 0.05
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_saving_and_loading_gives_the_same_answers(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    some = demo.samples(8)
    arguments = [s.image for s in some], [s.question for s in some]
    assert demo.answer(again, AutoProcessor.from_pretrained(tmp_path), *arguments) == demo.answer(model, processor, *arguments)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_any_mode_and_size(loaded: tuple[Any, Any], mode: str) -> None:
    picture = Image.new("RGB", (333, 120), (200, 30, 30)).convert(mode)
    assert demo.answer(*loaded, [picture.convert("RGB")], ["how many red things are there ?"])[0]


def test_unknown_words_and_the_chat_template(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    sample = demo.samples(1)[0]
    assert isinstance(demo.answer(model, processor, [sample.image], ["what is the quux zorp ?"])[0], str)
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == demo.prompt(sample.question)


def test_bad_arguments(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected n >= 1 questions, got 0"):
        demo.evaluate(loaded[0], 0)


def test_the_card_and_the_log_are_there() -> None:
    card = CARD.read_text()
    assert all(f"| {kind} |" in card for kind in KINDS)
    assert "CC BY 4.0" in card
    lines = [json.loads(line) for line in (PACKAGE / "model" / "training_log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"tower", "language"}
