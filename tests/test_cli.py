"""The shell: results on standard output, one-line errors on standard error, exit codes that scripts can use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from effvlm import cli, demo

SCRIPT = [sys.executable, "-c", "from effvlm.cli import main; main()"]


def call(capfd: Any, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``effvlm …``."""
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    out, error = capfd.readouterr()
    return int(done.value.code or 0), out, error


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "own.png"
    demo.samples(1)[0].image.save(path)
    return path


def test_version_and_help(capfd: Any) -> None:
    import effvlm

    assert call(capfd, "--version") == (0, f"{effvlm.__version__}\n", "")
    code, out, _ = call(capfd, "--help")
    assert code == 0
    assert all(name in out for name in ("demo", "run", "info"))


def test_info(capfd: Any) -> None:
    code, out, _ = call(capfd, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["cpu"]["isa"] in facts["cpu"]["supported"]
    assert {"token_match", "token_merge"} <= set(facts["ops"])
    assert facts["cuda"]["devices"] or facts["cuda"]["why_not"]
    code, out, _ = call(capfd, "info")
    assert "CPU kernels" in out


def test_demo_prints_the_table_and_draws_the_sheet(capfd: Any, tmp_path: Path, picture: Path) -> None:
    code, out, _ = call(capfd, "demo", "--n", 16, "--json", "--out", tmp_path / "made", "--images", picture.parent)
    result = json.loads(out)
    assert code == 0
    assert [row["keep"] for row in result["rows"]] == [1.0, 1.0, 0.5, 0.25, 0.1, *[0.25] * 7]
    assert [row["visual_tokens"] for row in result["rows"]] == [144, 144, 72, 36, 14, *[36] * 7]
    assert [row["name"] for row in result["rows"] if row["control"]][::2] == ["Random 25%", "Stride 25%", "Pool 25%"]
    assert all(row["low"] <= row["accuracy"] <= row["high"] and 0 <= row["p_unmodified"] <= 1 for row in result["rows"])
    for row in result["rows"]:
        assert row["accuracy"] == row["right"] / row["n"] == sum(k["right"] for k in row["kinds"].values()) / 16
        assert row["prefill_ms"] > 0
        assert row["ms_per_answer"] > 0
    assert result["rows"][0]["accuracy"] > 0.8
    assert result["rows"][1]["name"] == "enabled, lossless"
    assert result["rows"][1]["kinds"] == result["rows"][0]["kinds"]
    assert sum(s["expected"] is None for s in result["samples"]) == 3  # the questions about the picture in the folder
    with Image.open(result["contact_sheet"]) as sheet:
        assert sheet.width > 800
        assert len(sheet.getcolors(1 << 24) or []) > 1000


def test_demo_for_people(capfd: Any, tmp_path: Path) -> None:
    code, out, _ = call(capfd, "demo", "--n", 8, "--out", tmp_path)
    assert code == 0
    assert "unmodified" in out
    assert "ToMe 10%" in out
    assert "contact sheet" in out


def test_run(capfd: Any, picture: Path) -> None:
    sample = demo.samples(1)[0]
    code, out, _ = call(capfd, "run", "--image", picture, "--prompt", sample.question)
    assert (code, out.strip()) == (0, sample.answer)
    code, out, _ = call(capfd, "run", "--image", picture, "--prompt", sample.question, "--keep", 0.5, "--json")
    result = json.loads(out)
    assert (result["visual_tokens_in"], result["visual_tokens_out"]) == (144, 72)


def test_run_with_a_model_folder(capfd: Any, picture: Path, tmp_path: Path) -> None:
    model, processor = demo.load()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    sample = demo.samples(1)[0]
    code, out, _ = call(capfd, "run", "--model", folder, "--image", picture, "--prompt", sample.question)
    assert (code, out.strip()) == (0, sample.answer)


def _wrong_type(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--image", "{folder}/none.png", "--prompt", "x"], "expected an image file, found none at"),
        (["run", "--image", "{folder}/text.png", "--prompt", "x"], "expected an image that Pillow can read, got"),
        (["run", "--image", "{folder}/cut.png", "--prompt", "x"], "expected an image that Pillow can read, got"),
        (["run", "--image", "{picture}", "--prompt", "x", "--keep", "0"], "expected keep in (0, 1]"),
        (["run", "--image", "{picture}", "--prompt", "x", "--keep", "1.5"], "expected keep in (0, 1]"),
        (["run", "--image", "{picture}", "--prompt", "x", "--model", "{folder}"], "expected a model folder with a config.json"),
        (["run", "--image", "{picture}", "--prompt", "x", "--model", "{folder}/bert"], "expected an image-text-to-text model"),
        (
            ["run", "--image", "{picture}", "--prompt", "x", "--model", "{folder}/nonsense"],
            "expected an image-text-to-text model",
        ),
        (["demo", "--images", "{folder}/nowhere"], "expected a folder of pictures, found none at"),
        (["demo", "--images", "{folder}/bert"], "expected pictures (.png"),
        (["demo", "--out", "{folder}/text.png"], "text.png"),
    ],
)
def test_expected_errors_are_one_line(capfd: Any, picture: Path, arguments: list[str], text: str) -> None:
    folder = picture.parent
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(picture.read_bytes()[:2000])
    (folder / "bert").mkdir()
    if arguments[0] == "run":
        _wrong_type(folder / "bert")
    code, out, error = call(capfd, *(a.format(folder=folder, picture=picture) for a in arguments))
    assert code == 1
    assert out == ""
    assert text in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("effvlm:")]) == 1


def test_typos_are_told_with_a_suggestion(capfd: Any) -> None:
    code, _, error = call(capfd, "demo", "--jsn")
    assert code == 2
    assert "--json" in error
    code, _, error = call(capfd, "dmeo")
    assert code == 2
    assert "dmeo" in error


def test_debug_shows_the_traceback(picture: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "run", "--image", "none.png", "--prompt", "x"])


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def _interruptible() -> None:
    """A shell that runs the tests in the background has them, and what they start, ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_is_130_without_a_traceback(tmp_path: Path) -> None:
    command = [*SCRIPT, "demo", "--n", "4000", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=_interruptible
    ) as process:
        while process.poll() is None and not (tmp_path / "contact_sheet.png").exists():
            time.sleep(0.2)  # until it is in the middle of its work
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error


def test_threads_are_left_alone(capfd: Any) -> None:
    before = torch.get_num_threads()
    call(capfd, "info")
    assert torch.get_num_threads() == before
