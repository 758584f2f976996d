"""What the benchmarks' numbers are made of, and every suite at its smallest size."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attribution, engines, measure, processes, records, report
from benchmarks.__main__ import SUITES, main
from benchmarks.ops import row_masked_linear
from benchmarks.shapes import build
from benchmarks.training import memory, peers, step


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.interleave(contenders, rounds=4, least=0)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}
    # one call each to warm up, then rounds that start one further each time
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_short_calls_are_repeated(monkeypatch):
    calls = []

    def seconds(function, repeats=1):
        """Of a machine on which any call takes as long."""
        for _ in range(repeats):
            function()
        return 1e-5

    monkeypatch.setattr(measure, "seconds", seconds)
    measure.interleave({"ours": lambda: calls.append(0)}, rounds=1, least=0.001)
    assert len(calls) >= 100


def test_host_and_device_seconds(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    host, device = measure.interleave_host_and_device({"ours": lambda: sum(range(99))}, 2)
    assert host == device
    assert len(host["ours"]) == 2

    class Profile:
        def __init__(self, activities):
            assert activities == [measure.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            kernel = {"device_type": measure.DeviceType.CUDA, "is_user_annotation": False}
            launch = kernel | {"device_type": measure.DeviceType.CPU}
            annotation = kernel | {"is_user_annotation": True}
            span = SimpleNamespace(elapsed_us=lambda: 6.0)
            kinds = (kernel, launch, annotation, kernel)
            return [SimpleNamespace(time_range=span, **kind) for kind in kinds]

    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(measure, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    host, device = measure.host_and_device(lambda: calls.append(time.sleep(1e-3)), 3)
    assert len(calls) == 6
    assert 1e-3 <= host < 1
    assert device == pytest.approx(4e-6)  # 12 us of kernels in three calls


def test_quantiles():
    assert measure.quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert measure.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


def test_records_pair_rounds(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(100.0, 10.0))
    assert measure.floor(50.0, 1.0) == 0.5
    assert measure.floor(50.0, 20.0) == 2.0
    times = {"ours": [1.0, 2.0, 4.0], "full": [2.0, 6.0, 8.0], "lora": [1.0, 1.0, 1.0]}
    found = measure.pair("s", {"k": 1}, times, floor_s=0.5, notes={"lora": "scaled"})
    assert [record["peer"] for record in found] == ["full", "lora"]
    assert found[0]["ratio"]["p50"] == 2.0  # of 2, 3, 2; the medians' ratio would be 3
    assert found[0]["of_floor"] == 0.25
    assert "note" not in found[0]
    assert found[1]["note"] == "scaled"


def test_a_wrong_result_is_not_timed():
    good = torch.ones(3)
    measure.check("scores", good, good, 1e-6)
    for bad in (good + 0.1, good * float("nan")):
        with pytest.raises(SystemExit, match="scores is off"):
            measure.check("scores", bad, good, 1e-6)


def test_a_part_that_fails_ends_no_other(capsys):
    measure.finish()
    for what, error in (("a", None), ("b", ValueError("no\nroom")), ("c", SystemExit("is off"))):
        with measure.attempt(what):
            if error:
                raise error
    said = capsys.readouterr().out
    assert said == "not measured: b: ValueError: no\nnot measured: c: is off\n"
    with pytest.raises(SystemExit, match=r"^not measured: b; c$"):
        measure.finish()
    measure.finish()
    with pytest.raises(KeyboardInterrupt), measure.attempt("d"):  # out of its time
        raise KeyboardInterrupt


def test_a_wrong_method_is_not_timed_and_the_others_are(monkeypatch, capsys):
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e10))
    begun = step.begin
    losses = {"full": 9.0, "lora": 5.5}

    def begin(method, *case):
        if method == "dora":
            raise RuntimeError("no room")
        return begun(method, *case)[0], losses.get(method, 5.5)

    monkeypatch.setattr(step, "begin", begin)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "training_step", "--dry-run"])
    with pytest.raises(SystemExit, match=r"^not measured: .*full; .*dora$"):
        main()
    said = capsys.readouterr().out
    assert "32 tokens, full: its first loss is 9 and not 5.5" in said
    assert "32 tokens, dora: RuntimeError: no room" in said
    assert "| lora" in said

    monkeypatch.setitem(row_masked_linear.PEERS, "delta_form", lambda *_: {}["nothing"])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "row_masked_linear", "--dry-run"])
    with pytest.raises(SystemExit, match=r"^not measured: row_masked_linear, delta_form$"):
        main()
    assert "trainable_tokens" in capsys.readouterr().out


def test_a_process_that_fails_leaves_the_others_peaks(monkeypatch, capsys):
    def run(command, **_):
        failed = "lora" in command
        return SimpleNamespace(returncode=failed, stderr="full", stdout="1")

    monkeypatch.setattr(subprocess, "run", run)
    assert {record["peer"] for record in memory.run("dry")} == {"full", "ours_protected"}
    assert "not measured: memory, tiny, lora: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        measure.finish()


def test_lora_multiplies_in_the_models_dtype():
    model = build("tiny").bfloat16()
    for dora in (False, True):
        made = peers.lora(copy.deepcopy(model), dora=dora)
        trained = [p for p in made.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.bfloat16}


def test_the_least_work_by_count(monkeypatch):
    """Of Llama-3.1-8B's shape, counted by hand."""
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e30))
    monkeypatch.setattr(attribution, "DTYPE", torch.bfloat16)
    model = "Llama-3.1-8B"
    for tokens, tera in ((128, 5.310), (512, 10.79), (2048, 33.48)):
        assert attribution.least_work(model, None, tokens, 7) / 1e12 == pytest.approx(tera, 1e-3)
    assert attribution.least_bytes(model, None) / 1e9 == pytest.approx(43.98, 1e-3)
    for layers, tokens, seconds in ((4, 4096, 21.31), (8, 8192, 71.6)):
        assert step.least_time(model, layers, tokens) == pytest.approx(seconds, 1e-3)


def record(device="GPU 1", suite="selection", peer="numpy_argsort", ours=1.0, ratio=4.0, **case):
    spread = {"p20": ratio / 2, "p50": ratio, "p80": ratio * 2}
    return {
        "device": device,
        "torch": "2.13",
        "transformers": "5.23",
        "command": "python -m benchmarks",
        "suite": suite,
        "case": {"samples": 16, "layers": 32, "nodes": 4096, "quota": 10.0} | case,
        "peer": peer,
        "rounds": 3,
        "ours_s": {"p50": ours},
        "peer_s": {"p50": ours * ratio},
        "ratio": spread,
        "of_floor": 0.5,
    }


def test_reruns_append_and_the_newest_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_FOLDER", tmp_path)
    for ours in (1.0, 2.0):
        records.append_record(record(ours=ours))
    records.append_record({"device": "GPU 1", "suite": "an older kind of record"})
    path = tmp_path / "gpu-1.jsonl"
    assert len(path.read_text().splitlines()) == 3
    (newest,) = report.read_records(tmp_path)
    assert newest == record(ours=2.0)


def test_tables_tell_what_was_measured():
    memory = {
        **record(suite="memory", peer="full", model="SmolLM2-135M", tokens=512),
        "ours_bytes": 100 << 20,
        "peer_bytes": 400 << 20,
    }
    text = report.tables([record(), record(nodes=512, ratio=2.0), memory])
    assert "4 (2 to 8) | 50% |" in text
    assert "| full | 100 MiB | 400 MiB | 4.00 |" in text
    assert text.count("numpy_argsort") == 2


def test_ops_have_a_table_of_their_own():
    op = {
        "device": "GPU 1",
        "torch": "2.13",
        "transformers": "5.23",
        "command": "python -m benchmarks ops",
        "suite": "ops",
        "case": {"op": "gated_product", "tokens": 4096, "step": "backward"},
        "peer": "triton",
        "host_s": {"p50": 2e-4},
        "device_s": {"p50": 3e-3},
        "of_floor": 0.5,
    }
    text = report.tables([record(), op])
    line = "| gated_product | tokens 4096, step backward | triton | 3 ms | 200 µs | 50% |"
    assert text.endswith(f"{line}\n")
    assert "numpy_argsort" in text
    assert "| peer |" not in report.tables([op])


def test_a_scaled_peer_says_so():
    assert "published (three of the layers" in report.tables(
        [record(peer="published") | {"note": "three of the layers, scaled to all"}]
    )


def test_a_floor_that_was_counted_again_is_said():
    again = record() | {"recounted": "2026-11-29"}
    assert "\nCounted again since: the floors of selection.\n" in report.tables([again])
    assert "Counted again" not in report.tables([record()])
    memory = record(suite="memory", peer="lora") | {"note": "factors in float32"}
    sizes = dict.fromkeys(("ours_bytes", "peer_bytes"), 1 << 20)
    assert "| lora (factors in float32) |" in report.tables([memory | sizes])


def test_growth_curves(tmp_path):
    path = tmp_path / "growth.png"
    assert not report.plot([record()], "GPU 1", path)  # one point is no curve
    found = [record(nodes=n, ours=n / 1000) for n in (512, 4096)]
    assert report.plot(found, "GPU 1", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not report.plot(found, "GPU 2", path)


def test_the_committed_report_is_of_the_committed_records(tmp_path, monkeypatch):
    committed = report.REPORT.read_bytes()
    monkeypatch.setattr(report, "REPORT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(records, "_FOLDER", tmp_path)  # of the plots
    report.write_report()
    assert report.REPORT.read_bytes() == committed


@pytest.mark.parametrize("suite", sorted({*SUITES} - {"ops", "peers"}))  # elsewhere
def test_a_suite_runs(suite, monkeypatch, capsys):
    started = subprocess.run

    def run(command, **options):
        """Of memory's processes, which import for ten seconds each, one is started."""
        if "benchmarks.training.memory" not in command or "ours" in command:
            return started(command, **options)
        method, name, *sizes = command[3:]
        peak = memory.measure_peak(method, name, *map(int, sizes))
        return SimpleNamespace(returncode=0, stdout=str(peak))

    monkeypatch.setattr(subprocess, "run", run)
    # Measuring them takes five seconds, and test_goals does.
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e10))
    monkeypatch.setattr(sys, "argv", ["benchmarks", suite, "--dry-run"])
    main()
    assert f"{suite} " in capsys.readouterr().out


def test_engines_are_compared_on_the_same_weights_in_every_run(monkeypatch):
    monkeypatch.setattr(engines, "SIZES", engines.SIZES | {"num_hidden_layers": 4})
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append([model.lm_head.weight[0, :9].tolist() for _, model in engines.models()])
    assert len(runs[0]) == 3
    assert runs[0] == runs[1]


def test_an_unknown_suite_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "selection", "speed"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unknown suite speed" in capsys.readouterr().err


def test_processes_wait_for_the_last_one_by_count():
    one, few, many = (processes.busy(285, n) for n in (1, 4, 64))
    assert one == 1
    assert many < few < 1
    assert processes.busy(20_000, 4) > few


def test_processes_share_an_attribution_that_is_timed(monkeypatch, capsys):
    arguments = ["processes", "--processes", "1", "--prompts", "2", "--layers", "1", "--count", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(processes, "_COUNTS", (50,))
    processes.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| 1 |")
    assert lines[3].endswith("| 1.00 |")
    assert lines[-1].startswith("| 2 | ")
