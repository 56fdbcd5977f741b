"""effvlm.enable on Mamba-like mixers: every family of the installed transformers, exactly what it was, only faster."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixers import families, tiny

import effvlm
from effvlm.hf import hub_kernels, mixers, rebind, scans

IDS = torch.randint(3, 64, (2, 37), generator=torch.Generator().manual_seed(3))
PADDED = torch.tensor([[0] * 9 + [1] * 28, [1] * 37])


def _out(model: Any, **inputs: Any) -> torch.Tensor:
    got = model(**inputs)
    return got.logits if "logits" in got else got.last_hidden_state


def _mixers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if rebind.scans_of(type(m))}


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def _turns(model: Any) -> list[torch.Tensor]:
    """A prefill with left padding, two steps on its cache and, if there is one, what a second prefill on it gives."""
    first = model(input_ids=IDS[:, :20], attention_mask=PADDED[:, :20], use_cache=True)
    cache = first.past_key_values if "past_key_values" in first else first.cache_params
    name = "past_key_values" if "past_key_values" in first else "cache_params"
    outs = [first[0]]
    for t in (20, 21):
        outs.append(model(input_ids=IDS[:, t : t + 1], attention_mask=PADDED[:, : t + 1], **{name: cache}, use_cache=True)[0])
    # Mamba-1 wants the mask of the new tokens alone.
    mask = PADDED[:, 22:30] if name == "cache_params" else PADDED[:, :30]
    outs.append(model(input_ids=IDS[:, 22:30], attention_mask=mask, **{name: cache}, use_cache=True)[0])
    return outs


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_same_outputs(family: str) -> None:
    """Prefill, padding, steps, a second turn and generate; nothing left behind by disable."""
    model, untouched = tiny(family), tiny(family)
    wanted, turns = _out(model, input_ids=IDS), _turns(model)
    said = model.generate(IDS, max_new_tokens=5, do_sample=False) if model.can_generate() else None
    report = effvlm.enable(model)
    found = _mixers(model)
    assert found
    assert set(found) <= set(report.modules)
    assert not any("forward" in vars(m) for m in _mixers(untouched).values())
    _close(_out(model, input_ids=IDS), wanted)
    for got, before in zip(_turns(model), turns, strict=True):
        _close(got, before)
    if said is not None:
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), said)
    effvlm.disable(model)
    assert not any("forward" in vars(m) for m in found.values())
    assert torch.equal(_out(model, input_ids=IDS), wanted)


def test_all_functions_of_all_families_are_found() -> None:
    """By inspection of the modeling files; the counts are those of transformers 5.23."""
    found = Counter(known for f in families() for known in {k for m in mixers.mixers_of(f) for k in rebind.scans_of(m).values()})
    assert found["selective_scan_fn"] >= 4
    assert found["mamba_chunk_scan_combined"] >= 6
    assert found["causal_conv1d_fn"] >= 23  # 22 decorated and lfm3's own
    assert found["causal_conv1d_update"] >= 23
    assert found["chunk_gated_delta_rule"] == found["fused_recurrent_gated_delta_rule"] >= 5
    assert found["chunk_kda"] == found["fused_recurrent_kda"] >= 3
    assert set(found) == set(scans.FUNCTIONS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of our functions is called."""
    counted: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for name, function in scans.FUNCTIONS.items():
        monkeypatch.setitem(scans.FUNCTIONS, name, counting(name, function))
    rebind.forward_with_ours.cache_clear()
    yield counted
    rebind.forward_with_ours.cache_clear()


@torch.no_grad()
def test_it_is_ours_that_runs(calls: Counter[str]) -> None:
    """One call per layer, function and forward, and none after disable."""
    model = tiny("falcon_mamba")
    effvlm.enable(model)
    model.generate(IDS, attention_mask=PADDED, max_new_tokens=4, do_sample=False)
    assert calls == {
        "causal_conv1d_fn": 3,
        "selective_scan_fn": 3,
        "causal_conv1d_update": 9,
        "selective_state_update": 9,
    }
    effvlm.disable(model)
    model(IDS)
    assert sum(calls.values()) == 24


@pytest.mark.parametrize("family", ["mamba", "mamba2", "qwen3_5", "kimi_linear", "lfm3"])
def test_gradients(family: str) -> None:
    """Fine-tuning does not break: the gradients of all parameters are those of the unpatched model."""
    model = tiny(family).train()
    ids = IDS[:, :19]
    grads = []
    for enabled in (False, True):
        if enabled:
            effvlm.enable(model)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, before in grads[0].items():
        assert (grads[1][name] - before).abs().max() <= 2e-5 * max(before.abs().max().item(), 1e-2), name


@torch.no_grad()
def test_classes_replaced_before_loading(tmp_path: Path) -> None:
    """from_pretrained builds the mixers with our forward; models loaded before and after have their own."""
    before = tiny("mamba2")
    before.save_pretrained(tmp_path)
    names = effvlm.hf.replace_classes("mamba2")
    try:
        model = type(before).from_pretrained(tmp_path)
    finally:
        effvlm.hf.restore_classes()
    assert names == ["Mamba2Mixer"]
    report = effvlm.enable(model)
    assert all("replaced when it was loaded" in report.modules[name] for name in _mixers(before))
    after = type(before).from_pretrained(tmp_path)
    kinds = [{type(m) for n, m in x.named_modules() if n.endswith("mixer")} for x in (before, model, after)]
    assert kinds[0] == kinds[2] != kinds[1]
    assert {k.__name__ for k in kinds[1]} == {"Mamba2Mixer"}
    _close(_out(model, input_ids=IDS), _out(before, input_ids=IDS))
    with pytest.raises(ValueError, match="llama"):
        effvlm.hf.replace_classes("llama")
    with pytest.raises(ValueError, match="no model type 'mamba7'"):
        effvlm.hf.replace_classes("mamba7")


@torch.no_grad()
def test_what_is_not_ours_runs_theirs() -> None:
    """float64 has no kernel: transformers' own function, said once, with the same result."""
    model = tiny("mamba").double()
    wanted = _out(model, input_ids=IDS)
    effvlm.enable(model)
    effvlm._library._said.discard("scans: effvlm has no scans in float64")
    with pytest.warns(UserWarning, match="no scans in float64"):
        got = _out(model, input_ids=IDS)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_hooks_of_accelerate_stay() -> None:
    """A forward kept in the instance under accelerate's name is the one replaced; anyone else's is left alone and reported."""
    model = tiny("mamba")
    first, second = (layer.mixer for layer in model.backbone.layers[:2])
    kept = first.forward
    first._old_forward = kept
    first.forward = lambda *args, **kwargs: first._old_forward(*args, **kwargs)
    second.forward = second.forward
    report = effvlm.enable(model)
    assert first._old_forward != kept
    assert "something else" in report.fallbacks["backbone.layers.1.mixer"]
    effvlm.disable(model)
    assert first._old_forward == kept
    assert "forward" in vars(second)


@torch.no_grad()
def test_copies_and_saving(tmp_path: Path) -> None:
    """A copy runs our kernels on its own weights; what is saved is what transformers loads."""
    model = tiny("qwen3_5")
    wanted = _out(model, input_ids=IDS)
    effvlm.enable(model)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.zero_()
    _close(_out(model, input_ids=IDS), wanted)
    model.save_pretrained(tmp_path)
    _close(_out(type(model).from_pretrained(tmp_path), input_ids=IDS), wanted)


def test_layers_for_the_kernels_package_have_the_parameters_of_what_they_stand_for() -> None:
    """What it checks before it takes a layer: number and kinds of parameters, no constructor and no members of its own."""
    checked = set()
    for family in families():
        for kind in mixers.mixers_of(family):
            for name, known in rebind.scans_of(kind).items():
                if known in ("mamba_inner_fn", "mamba_split_conv1d_scan_combined"):
                    continue
                layer = hub_kernels.Ours(known).load()
                theirs = inspect.signature(inspect.unwrap(inspect.unwrap(kind.forward).__globals__[name])).parameters
                ours = list(inspect.signature(layer.forward).parameters.values())[1:]
                assert [p.kind for p in ours] == [p.kind for p in theirs.values()], (family, known)
                assert layer.__init__ is torch.nn.Module.__init__
                assert set(dir(layer)) - set(dir(torch.nn.Module)) <= {"has_backward"}
                checked.add(known)
    assert len(checked) == 9
    with pytest.raises(ImportError, match="enable needs none"):
        effvlm.hf.register_kernels()


def test_functions_of_the_kernels_package_are_recognised() -> None:
    """With it, the modeling files' functions are modules that carry their name."""

    class Function(torch.nn.Module):
        kernel_layer_name = "causal_conv1d_fn"

    assert rebind.scan_name("anything", Function()) == "causal_conv1d_fn"
    assert rebind.scan_name("causal_conv1d_fn", print) == ""  # of this name, but not transformers'
    assert rebind.scan_name("x", Function) == ""


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "granitemoehybrid", "qwen3_5"])
def test_compiled(family: str) -> None:
    """torch.compile sees our functions, not those of the module the forward comes from."""
    model = tiny(family)
    wanted = _out(model, input_ids=IDS, use_cache=False)
    effvlm.enable(model)
    torch._dynamo.reset()
    _close(_out(torch.compile(model, backend="aot_eager"), input_ids=IDS, use_cache=False), wanted)


def test_packed_sequences_by_index() -> None:
    """seq_idx and cu_seqlens say the same; without a package of GPU kernels transformers refuses both."""
    x, weight = torch.randn(1, 8, 12), torch.randn(8, 4)
    index = torch.tensor([[0] * 5 + [1] * 7])
    bounds = torch.tensor([0, 5, 12])
    got = scans.causal_conv1d_fn(x, weight, seq_idx=index)
    assert torch.equal(got, scans.causal_conv1d_fn(x, weight, cu_seqlens=bounds))
    assert torch.equal(got[..., 5:], scans.causal_conv1d_fn(x[..., 5:].contiguous(), weight))
    with pytest.raises(ValueError, match="batch of 2"):
        scans.causal_conv1d_fn(x.expand(2, 8, 12), weight, seq_idx=index.expand(2, 12))


def test_no_warnings_of_falling_back(tmp_path: Path) -> None:
    """In a fresh process, with a prefill, steps and training after enable."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, effvlm
from tiny_mixers import tiny
for family in ("falcon_mamba", "mamba2", "qwen3_5", "kimi_linear"):
    model = tiny(family)
    effvlm.enable(model)
    ids = torch.randint(3, 64, (1, 9))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "falling back" not in done.stdout + done.stderr
