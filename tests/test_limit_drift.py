"""`loki.limit_drift`: the limit holds, little is lost to it, and bad input changes nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loki_kernels as loki
from loki_kernels.cli import main
from loki_kernels.errors import UnsupportedModelError
from loki_kernels.forgetting import limit
from loki_kernels.team import Team
from tests.models import assert_unchanged, build_model, snapshot
from tests.test_drift import texts
from tests.tiny_training import ROWS, WordTokenizer, load_model, train


def trained(rank=None, dtype=torch.float32):
    base = build_model(dtype=dtype)
    model = copy.deepcopy(base)
    handle = loki.patch(model, ROWS, rank=rank)
    train(model)
    return base, handle


@pytest.mark.parametrize(("rank", "dtype"), [(None, torch.float32), (2, torch.bfloat16)])
def test_the_update_is_scaled_until_the_limit_holds(rank, dtype):
    base, handle = trained(rank, dtype)
    before = {name: value.clone() for name, value in handle.model.named_parameters()}
    whole = loki.drift(handle, texts=texts()).overall.kl
    share, found = loki.limit_drift(handle, whole / 4, texts())
    assert 0.3 < share < 0.7  # a square law says .5
    assert 0.9 * whole / 4 < found.overall.kl <= whole / 4
    again = loki.drift(base, handle, texts())
    assert torch.equal(again.token_kl, found.token_kl)
    for name, value in handle.model.named_parameters():
        if value.requires_grad:
            kept = 1 if name.endswith("delta_a") else share
            assert torch.equal(value, before[name] * kept), name
    merged = handle.merge()
    assert loki.drift(base, merged, texts()).overall.kl == pytest.approx(found.overall.kl, rel=0.05)


def test_as_much_is_read_as_it_is_told():
    base, handle = trained()
    words = [" ".join(f"w{i * k}" for i in range(1, 30)) for k in (1, 2, 3)]
    options = {"tokenizer": WordTokenizer(), "tokens": 40, "length": 9}
    whole = loki.drift(handle, texts=words, **options).overall.kl
    _, found = loki.limit_drift(handle, whole / 4, words, **options)
    assert found.overall.tokens == 40
    again = loki.drift(base, handle, words, **options)
    assert torch.equal(again.token_kl, found.token_kl)
    other = loki.drift(base, handle, words, **options | {"length": 30})
    assert not torch.equal(other.token_kl, found.token_kl)


@pytest.mark.parametrize("reshard", [None, False])
def test_sharded_rows(reshard, one_process):
    """Also after a forward pass, which with ``reshard_after_forward=False`` leaves them gathered:
    what was written then would lie in memory that is freed."""
    from torch.distributed.fsdp import fully_shard

    _, handle = trained()
    kl = loki.drift(handle, texts=texts()).overall.kl / 4
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(handle.model)
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    ids = torch.arange(6)[None].to(sharded.device)
    with torch.no_grad():
        sharded(ids)
    whole = loki.drift(sharded, texts=texts()).overall.kl
    assert whole == pytest.approx(4 * kl, rel=1e-4)
    with torch.no_grad():
        sharded(ids)
    share, found = loki.limit_drift(sharded, kl, texts())
    want_share, want = loki.limit_drift(handle, kl, texts())
    # float32 log-probabilities of about 5 are rounded by 2e-7, a KL of .008 by as much a token; the
    # share goes by its root
    assert found.overall.kl == pytest.approx(want.overall.kl, rel=1e-4)
    assert share == pytest.approx(want_share, rel=5e-5)


def test_an_update_within_the_limit_stays_as_it_is():
    _, handle = trained()
    before = snapshot(handle.model)
    share, found = loki.limit_drift(handle.model, 100.0, texts())
    assert share == 1
    assert found.overall.kl > 0
    assert_unchanged(handle.model, before)


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_limits(kl):
    _, handle = trained()
    before = snapshot(handle.model)
    with pytest.raises(ValueError, match="kl must be a positive number"):
        loki.limit_drift(handle, kl, texts())
    assert_unchanged(handle.model, before)


def test_what_cannot_be_scaled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        loki.limit_drift(build_model(), 0.1, texts())
    model = build_model()
    loki.patch(model, ROWS, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="trained whole"):
        loki.limit_drift(model, 0.1, texts())
    model.requires_grad_(False)  # a head that has moved is none of the base for that
    with pytest.raises(ValueError, match="trained whole"):
        loki.limit_drift(model, 0.1, texts())
    folder = tmp_path / "adapter"
    loki.save_adapter(model, folder)
    assert "lm_head.weight" in str(load_file(folder / "adapter_model.safetensors").keys())


def test_what_was_offloaded_is_told_so():
    _, handle = trained()
    accelerate.cpu_offload(handle.model, "cpu")
    with pytest.raises(UnsupportedModelError, match="before you offload"):
        loki.limit_drift(handle, 0.1, texts())


@pytest.mark.parametrize(
    "measured",
    [
        lambda handle: loki.limit_drift(handle, 0.1, texts()),
        lambda handle: loki.drift(handle, texts=texts()),
    ],
)
def test_what_zero_3_keeps_elsewhere_is_refused(measured):
    """The update is empty there, and what is scaled or left out of it for a moment is nothing."""
    _, handle = trained()
    before = snapshot(handle.model)
    for _, layer in handle.named_layers():
        layer.update.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 keeps the update elsewhere"):
        measured(handle)
    assert_unchanged(handle.model, before)


def test_a_measurement_that_fails_leaves_the_whole_update(monkeypatch):
    _, handle = trained()
    before = snapshot(handle.model)
    compare, calls = limit.compare, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    monkeypatch.setattr(limit, "compare", failing)
    with pytest.raises(KeyboardInterrupt):
        loki.limit_drift(handle, 1e-6, texts())
    assert_unchanged(handle.model, before)


def search(law, kl):
    tried = []

    def measure(share):
        tried.append(share)
        return SimpleNamespace(overall=SimpleNamespace(kl=law(share)))

    share, found = limit._search(measure, kl, Team())
    return share, found.overall.kl, len(tried)


@settings(deadline=None)
@given(
    power=st.floats(0.3, 4),
    size=st.floats(1e-6, 1e3),
    fraction=st.floats(1e-4, 2),
)
def test_the_limit_holds_for_any_power_law(power, size, fraction):
    kl = fraction * size
    share, left, count = search(lambda s: size * s**power, kl)
    assert left == size * share**power
    assert left <= kl
    assert count <= 9
    if fraction > 1:
        assert (share, count) == (1, 1)
    else:
        assert left >= 0.9 * kl


def test_a_limit_that_holds_nowhere_leaves_the_base():
    assert search(lambda s: float(s > 0), 0.5)[:2] == (0, 0)
    share, kl, _ = search(lambda s: float(s > 0.9), 0.5)
    assert 0.5 <= share <= 0.9
    assert kl == 0
    share, kl, _ = search(lambda s: s if s < 0.5 else float("inf"), 0.1)
    assert share == kl
    assert 0.095 <= kl <= 0.1


def test_a_merge_from_the_command_line(base_folder, tmp_path, capsys, monkeypatch):
    model = load_model(base_folder)
    handle = loki.patch(model, ROWS)
    train(model)
    words = tmp_path / "words.txt"
    words.write_text("\n\n".join(" ".join(f"w{i * k}" for i in range(9)) for k in (1, 2, 3)))
    whole = loki.drift(base_folder, handle, words).overall.kl
    loki.save_adapter(model, tmp_path / "adapter")
    command = ["merge", *map(str, (base_folder, tmp_path / "adapter", tmp_path / "merged"))]
    assert main([*command, "--texts", str(words)]) == 1
    assert main([*command, "--device", "cpu"]) == 1
    assert main([*command, "--tokens", "9"]) == 1
    assert "belong to --max-kl" in capsys.readouterr().err
    with monkeypatch.context() as patched:  # before a weight is read
        patched.setattr("loki_kernels.inspection.load_model", None)
        assert main([*command, "--max-kl", "-1"]) == 1
        assert main([*command, "--max-kl", "1", "--texts", "no.txt"]) == 1
        assert main([*command, "--max-kl", "1", "--length", "0"]) == 1
    with monkeypatch.context() as patched:
        patched.setattr("loki_kernels.forgetting.limit_drift", lambda *_, **__: (0.0, None))
        assert main([*command, "--max-kl", "1", "--texts", str(words)]) == 1
    assert "nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main([*command, "--max-kl", str(whole / 2), "--texts", str(words)]) == 0
    assert "of the update is kept, KL" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    left = loki.drift(base_folder, merged, words).overall.kl
    assert 0.4 * whole < left <= whole / 2 * 1.001
    command[-1] += "-of-few"
    few = ["--texts", str(words), "--tokens", "7", "--length", "5"]
    assert main([*command, "--max-kl", str(whole / 2), *few]) == 0
    assert "2 texts were left out (--tokens)" in capsys.readouterr().out


def test_the_limit_holds_in_the_process_that_has_moved_most():
    """Whose device rounds otherwise: all take one share, by the largest KL of any."""

    class Others:
        def tell(self, mine, *_):
            return [mine, repr(2 * float(mine))]

    def measure(share):
        return SimpleNamespace(overall=SimpleNamespace(kl=share**2), share=share)

    share, found = limit._search(measure, 0.5, Others())
    assert found.share == share
    assert 0.8 * 0.5 <= 2 * share**2 <= 0.5
