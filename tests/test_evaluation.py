"""Paired tests, intervals, verdicts, and the command that shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from effvlm import evaluation
from effvlm.cli import main
from effvlm.evaluation import Outcome, mcnemar, method_named, verdict, wilson
from effvlm.tokens import DivPrune, PixelPrune, ToMe


def test_mcnemar_is_the_exact_binomial_test() -> None:
    a = [True] * 10 + [False] * 2 + [True] * 50
    b = [False] * 10 + [True] * 2 + [True] * 50
    by_hand = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert mcnemar(a, b) == pytest.approx(by_hand) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0
    assert mcnemar([True] * 3000, [False] * 1400 + [True] * 1600) < 1e-300
    with pytest.raises(ValueError, match="same questions"):
        mcnemar(a, b[1:])


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def _outcome(name: str, right: int, control: bool = False) -> Outcome:
    marks = [True] * right + [False] * (100 - right)
    return Outcome(name, ["x"] * 100, marks, 36, 1.0, control)


def test_verdicts() -> None:
    whole, good, poor = _outcome("unmodified", 99), _outcome("Good", 95), _outcome("Poor", 70)
    controls = [_outcome("Random 25%", 80, True), _outcome("Pool 25%", 94, True)]
    everything = [whole, good, poor, *controls]
    for o in everything:
        o.versus_controls = {c.name: mcnemar(o.right, c.right) for c in controls if c is not o}
    assert verdict(good, everything) == "does not beat Pool"
    assert verdict(poor, everything) == "worse than Random, Pool"
    assert verdict(whole, everything) == verdict(controls[0], everything) == ""
    good.engaged = False
    assert verdict(good, everything) == "nothing was reduced"


def test_methods_by_name() -> None:
    assert method_named("tome", 0.3) == ToMe(keep=0.3)
    assert method_named("DivPrune", 0.3) == DivPrune(keep=0.3)
    assert method_named("PixelPrune", 0.3) == PixelPrune()
    with pytest.raises(ValueError, match="got 'VisonZip'; did you mean VisionZip"):
        method_named("VisonZip", 0.3)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command_on_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "evaluate", "--n", "16", "--method", "ToMe", "--method", "EVS", "--keep", "0.5", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [r["name"] for r in rows] == ["unmodified", "ToMe 50%", "EVS 50%", "Random 50%", "Stride 50%", "Pool 50%"]
    assert [r["visual_tokens"] for r in rows] == [144, 72, 144, 72, 72, 64]
    assert [r["engaged"] for r in rows] == [True, True, False, True, True, True]
    assert set(rows[1]["versus_controls"]) == {"Random 50%", "Stride 50%", "Pool 50%"}
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in rows)
    assert rows[0]["accuracy"] > 0.9
    arguments = ["evaluate", "--n", "8", "--method", "ToMe", "--keep", "0.5", "--no-controls", "--json"]
    code, out, _ = _run(capsys, *arguments, "--attention", "both")
    assert [r["name"] for r in json.loads(out)] == ["unmodified", "ToMe 50%", "ToMe 50%, proportional"]
    assert _run(capsys, *arguments, "--attention", "most")[0] == 1


def test_the_command_on_questions_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from effvlm.demo.evaluation import MODEL_DIR, samples

    lines = []
    for i, s in enumerate(samples(4)):
        s.image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": s.question, "answer": s.answer.upper()}))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(lines))
    code, out, err = _run(
        capsys, "evaluate", "--model", str(MODEL_DIR), "--data", str(data), "--keep", "0.5", "--no-controls", "--json"
    )
    assert code == 0, err
    assert [r["n"] for r in json.loads(out)] == [4, 4]
    assert json.loads(out)[0]["accuracy"] >= 0.75
    assert _run(capsys, "evaluate", "--data", str(data))[:2] == (1, "")
    data.write_text(lines[0] + "\n{}")
    assert "in line 2 of" in _run(capsys, "evaluate", "--model", str(MODEL_DIR), "--data", str(data))[2]


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "evaluate", "--n", "8", "--method", "ToMe", "--keep", "0.5")
    assert code == 0
    assert "control" in out
    assert evaluation._p(1e-9) == "< .0001"


def test_run_draws_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 96), (90, 120, 200)).save(tmp_path / "in.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("methods:\n- ToMe: {keep: 0.5}\n- Stride: {keep: 0.5}\n")
    arguments = ["run", "--image", str(tmp_path / "in.png"), "--prompt", "what shape is at the center ?"]
    code, out, err = _run(capsys, *arguments, "--recipe", str(recipe), "--trace", str(tmp_path / "trace.png"), "--json")
    assert code == 0, err
    assert json.loads(out)["visual_tokens_out"] == 36
    with Image.open(tmp_path / "trace.png") as drawn:
        assert drawn.size == (480, 480)
    code, _, err = _run(capsys, *arguments, "--trace", str(tmp_path / "t.png"))
    assert (code, "--keep below 1" in err) == (1, True)
