"""effvlm.nn: each mixer against the formula of its paper, written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv1d, conv2d, interpolate, layer_norm, silu, softplus

from effvlm import nn

torch.manual_seed(0)


def _close(got: torch.Tensor, wanted: torch.Tensor, limit: float = 2e-5) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= limit * max(1.0, wanted.abs().max().item())


def _head_norm(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """(B, H, L, D), each head of each token by itself."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("gated", [False, True])
def test_retention_parallel_form(gated: bool) -> None:
    """(Q Kᵀ ∘ D) V with the L×L matrix of decays."""
    mixer = nn.Retention(32, 4, bias=True, gated=gated)
    x = torch.randn(2, 77, 32)
    q, k, v = mixer.qkv(x).view(2, 77, 3, 4, 8).permute(2, 0, 3, 1, 4)
    i = torch.arange(77.0)
    gamma = 1 - torch.exp2(-5 - torch.arange(4.0))
    decay = torch.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i), 0.0)
    out = _head_norm((q @ k.mT / math.sqrt(8) * decay) @ v).transpose(1, 2).reshape(2, 77, 32)
    wanted = mixer.proj(out * silu(mixer.gate(x)) if gated else out)
    _close(mixer(x), wanted)


@torch.no_grad()
def test_retention_recurrent_and_chunkwise_forms() -> None:
    """Token by token, and in two pieces, on the state of what came before; the state passed in stays as it was."""
    mixer = nn.Retention(24, 3, decays=[0.5, 0.9, 1.0])
    x = torch.randn(2, 70, 24)
    whole = mixer(x, return_state=True)
    first = mixer(x[:, :41], return_state=True)
    before = first.state.clone()
    second = mixer(x[:, 41:], first.state, return_state=True)
    _close(torch.cat([first.out, second.out], 1), whole.out)
    _close(second.state, whole.state)
    state, outs = None, []
    for t in range(70):
        step = mixer(x[:, t : t + 1], state, return_state=True)
        state, outs = step.state, [*outs, step.out]
    _close(torch.cat(outs, 1), whole.out)
    assert torch.equal(first.state, before)
    with pytest.raises(ValueError, match="heads = 5"):
        nn.Retention(24, 5)
    with pytest.raises(ValueError, match="2 decays"):
        nn.Retention(24, 2, decays=[0.5, 1.5])


def _scan(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """Mamba's recurrence over (batch, D, L), step by step, for explicit (permuted) sequences."""
    h = u.new_zeros(len(u), u.shape[1], A.shape[1])
    out = []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(out, 2)


def _orders(height: int, width: int) -> list[torch.Tensor]:
    rows = torch.arange(height * width)
    columns = rows.view(height, width).T.flatten()
    return [rows, columns, rows.flip(0), columns.flip(0)]


def _directional(mixer: nn.VisionScan2d, u: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """One direction as VMamba computes it: permute, project, scan, permute back."""
    R, N = mixer.dt_projs_weight.shape[2], mixer.A_logs.shape[1]
    D = u.shape[1]
    x = u[:, :, order]
    dt, B, C = torch.einsum("bdl,cd->bcl", x, mixer.x_proj_weight[k]).split([R, N, N], 1)
    dt = softplus(torch.einsum("brl,dr->bdl", dt, mixer.dt_projs_weight[k]) + mixer.dt_projs_bias[k][:, None])
    A, skip = -mixer.A_logs.view(-1, D, N)[k].exp(), mixer.Ds.view(-1, D)[k]
    y = torch.empty_like(u)
    y[:, :, order] = _scan(x, dt, A, B, C, skip)
    return y


@pytest.mark.parametrize(("directions", "state_size"), [("cross", 1), ("cross", 8), ("bidirectional", 4), ("multi_scale", 4)])
def test_vision_scan(directions: str, state_size: int) -> None:
    """Against explicit permutations, scans one by one, and the sum."""
    mixer = nn.VisionScan2d(16, state_size=state_size, directions=directions)
    x = torch.randn(2, 6, 9, 16)
    inner, z = mixer.in_proj(x).chunk(2, -1)
    maps = silu(conv2d(inner.permute(0, 3, 1, 2), mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=32))
    u = maps.flatten(2)
    orders = _orders(6, 9)
    if directions == "cross":
        y = sum(_directional(mixer, u, order, k) for k, order in enumerate(orders))
    elif directions == "bidirectional":
        y = _directional(mixer, u, orders[0], 0) + _directional(mixer, u, orders[2], 1)
    else:
        small = conv2d(maps, mixer.down.weight, mixer.down.bias, stride=2, padding=1, groups=32)
        low = sum(_directional(mixer, small.flatten(2), order, k + 1) for k, order in enumerate(_orders(*small.shape[2:])[1:]))
        up = interpolate(low.view(small.shape), (6, 9), mode="bilinear")
        y = _directional(mixer, u, orders[0], 0) + up.flatten(2)
    y = layer_norm(y.mT, (32,), mixer.out_norm.weight, mixer.out_norm.bias).view(2, 6, 9, 32)
    wanted = mixer.out_proj(y * silu(z))
    _close(mixer(x), wanted)
    mixer(x).square().mean().backward()
    ours = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    wanted.square().mean().backward()
    for p, got in zip(mixer.parameters(), ours, strict=True):
        _close(got, p.grad, 1e-4)


def test_vision_scan_refuses_unknown_directions() -> None:
    with pytest.raises(ValueError, match="cross, bidirectional, multi_scale"):
        nn.VisionScan2d(16, directions="spiral")


@pytest.mark.parametrize("halve", [False, True])
def test_vim_mixer(halve: bool) -> None:
    """Two inner Mambas, the second on flipped tokens, its result flipped back."""
    mixer = nn.VimMixer(16, state_size=4, halve=halve)
    x = torch.randn(2, 21, 16)
    u, z = mixer.in_proj(x).mT.chunk(2, 1)
    total = 0
    for suffix in ("", "_b"):
        v = u.flip(2) if suffix else u
        conv, x_proj, dt_proj = (getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        v = silu(conv1d(v, conv.weight, conv.bias, padding=3, groups=32)[..., :21])
        dt, B, C = x_proj(v.mT).mT.split([1, 4, 4], 1)
        dt = softplus(dt_proj(dt.mT).mT)
        A, D = -getattr(mixer, f"A{suffix}_log").exp(), getattr(mixer, f"D{suffix}")
        y = _scan(v, dt, A, B, C, D)
        total = total + (y.flip(2) if suffix else y) * silu(z)
    wanted = mixer.out_proj((total / 2 if halve else total).mT)
    _close(mixer(x), wanted)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_gated_conv(order: int) -> None:
    """Recursive gates with channels that double, by einsum and explicit slices."""
    mixer = nn.GatedConv(32, order, scale=0.5)
    x = torch.randn(2, 32, 7, 10)
    widths = [32 // 2 ** (order - 1 - k) for k in range(order)]
    both = torch.einsum("bchw,oc->bohw", x, mixer.proj_in.weight[..., 0, 0]) + mixer.proj_in.bias[:, None, None]
    p, rest = both[:, : widths[0]], both[:, widths[0] :]
    q = conv2d(rest, mixer.dwconv.weight, mixer.dwconv.bias, padding=3, groups=rest.shape[1]) * 0.5
    start = 0
    for k, width in enumerate(widths):
        if k:
            w = mixer.pws[k - 1]
            p = torch.einsum("bchw,oc->bohw", p, w.weight[..., 0, 0]) + w.bias[:, None, None]
        p = p * q[:, start : start + width]
        start += width
    wanted = torch.einsum("bchw,oc->bohw", p, mixer.proj_out.weight[..., 0, 0]) + mixer.proj_out.bias[:, None, None]
    _close(mixer(x), wanted)
    with pytest.raises(ValueError, match="order = 7"):
        nn.GatedConv(32, 7)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7)])
def test_spectral_mixer(height: int, width: int) -> None:
    """A product of spectra is a circular convolution of the map with the filter's inverse transform, summed by hand."""
    mixer = nn.SpectralMixer(3, height, width)
    x = torch.randn(2, height * width, 3)
    filter = torch.fft.irfft2(torch.view_as_complex(mixer.complex_weight.double()), s=(height, width), dim=(0, 1))
    maps = x.double().view(2, height, width, 3)
    wanted = torch.zeros_like(maps)
    for dy in range(height):
        for dx in range(width):
            wanted += filter[dy, dx] * maps.roll((dy, dx), (1, 2))
    _close(mixer(x).double(), wanted.view(2, -1, 3), 1e-4)
    assert mixer(torch.randn(2, 12, 3), (3, 4)).shape == (2, 12, 3)
    with pytest.raises(ValueError, match="pass size="):
        mixer(torch.randn(2, 11, 3))


def test_mlstm_against_the_stabilised_recurrence() -> None:
    """Equations 19 to 27 of the paper, with its running maximum m."""
    B, L, H, K, V = 2, 40, 2, 8, 12
    q, k, v = torch.randn(B, L, H, K) / K**0.5, torch.randn(B, L, H, K), torch.randn(B, L, H, V)
    gates = torch.randn(2, B, L, H) * 3
    C, n, m = torch.zeros(B, H, K, V), torch.zeros(B, H, K), torch.full((B, H), -math.inf)
    wanted = []
    for t in range(L):
        log_f = torch.nn.functional.logsigmoid(gates[1, :, t])
        new = torch.maximum(log_f + m, gates[0, :, t])
        f, i = (log_f + m - new).exp(), (gates[0, :, t] - new).exp()
        C = f[..., None, None] * C + (i[..., None] * k[:, t])[..., None] * v[:, t, :, None]
        n, m = f[..., None] * n + i[..., None] * k[:, t], new
        top = torch.einsum("bhkv,bhk->bhv", C, q[:, t])
        below = torch.maximum((n * q[:, t]).sum(-1).abs(), (-m).exp())
        wanted.append(top / below[..., None])
    got, state = nn.mlstm(q, k, v, gates[0], gates[1])
    _close(got, torch.stack(wanted, 1), 1e-4)
    first, middle = nn.mlstm(q[:, :17], k[:, :17], v[:, :17], gates[0, :, :17], gates[1, :, :17])
    second, last = nn.mlstm(q[:, 17:], k[:, 17:], v[:, 17:], gates[0, :, 17:], gates[1, :, 17:], initial_state=middle)
    _close(torch.cat([first, second], 1), got, 1e-4)
    _close(last, state, 1e-4)
