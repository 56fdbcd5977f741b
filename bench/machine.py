"""The machine a number was made on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from effvlm import _core
from effvlm._info import cpu_name

ROOT = Path(__file__).parents[1]


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "csrc", "effvlm"], capture_output=True, text=True, check=True
        ).stdout
        return head + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _generation() -> str:
    """CPU family and model as Linux gives them: clouds call processors of several generations by one name."""
    try:
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, value in lines if key.strip() in ("cpu family", "model")}
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def record(device: str) -> dict[str, Any]:
    """What is stored with every number."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "generation": _generation(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _core.cpu_isa(),
        "system": platform.platform(),
        "versions": _versions("effvlm", "torch", "transformers", "llama_cpp_python"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        facts["toolkit"] = _core.cuda_version
    return facts


def name(device: str) -> str:
    """A folder name for results of this machine."""
    text = torch.cuda.get_device_name(0) if device == "cuda" else f"{cpu_name()} {os.cpu_count()} cores"
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
