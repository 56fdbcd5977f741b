"""What chunk_scan's header says of NaN: it stays inside its head and goes forwards only, in every kind of recurrence."""

from __future__ import annotations

import pytest
import torch
from levels import at

from effvlm.ops import chunk_scan

STEP = 37  # of 45: in the middle of a chunk, neither the first one nor full


@pytest.mark.parametrize("where", ["q", "k", "v", "log_decay"])
@pytest.mark.parametrize(("delta", "channel"), [(False, False), (True, False), (False, True), (True, True)])
def test_nan_goes_forwards_inside_its_head(where: str, delta: bool, channel: bool, level: str) -> None:
    torch.manual_seed(0)
    x = {name: torch.randn(1, 45, 2, 5) for name in "qkv"}
    x["log_decay"] = -torch.rand(1, 45, 2, 5) if channel else -torch.rand(1, 45, 2)
    beta = torch.rand(1, 45, 2) / 10 if delta else None
    with at(level) as device:
        beta = beta.to(device) if beta is not None else None
        clean = chunk_scan(**{name: t.to(device) for name, t in x.items()}, beta=beta)
        x[where][0, STEP, 1] = float("nan")
        got = chunk_scan(**{name: t.to(device) for name, t in x.items()}, beta=beta)
    assert torch.equal(got.out[:, :, 0], clean.out[:, :, 0])
    assert torch.equal(got.final_state[:, 0], clean.final_state[:, 0])
    # A chunk with NaN may go another way, and round otherwise.
    torch.testing.assert_close(got.out[:, :STEP], clean.out[:, :STEP], rtol=1e-5, atol=1e-5)
    assert got.out[:, STEP, 1].isnan().all()
    if where == "q":
        torch.testing.assert_close(got.out[:, STEP + 1 :], clean.out[:, STEP + 1 :], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.final_state, clean.final_state, rtol=1e-5, atol=1e-5)
    else:
        assert got.final_state[:, 1].isnan().all()
