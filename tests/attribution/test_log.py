"""``out=``: a log that goes on after whatever ended the process, or is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import loki_kernels as loki
from loki_kernels import Attribution, attribute
from loki_kernels.attribution import fitting, job, log
from loki_kernels.attribution.fitting import Fitting
from loki_kernels.attribution.plan import BatchLimits
from loki_kernels.attribution.result import model_settings
from tests.attribution.results import BESIDE, assert_same
from tests.models import build_model

ROOT = Path(__file__).parents[2]
PROMPTS = [{"input_ids": [1 + i, 5, *range(2, 2 + i % 4)]} for i in range(8)]
OPTIONS = {"batch_size": 2, "steps": 1}
BATCHES = 4
TINIEST = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
)


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "result.safetensors"


@pytest.fixture
def attributed(monkeypatch):
    """The prompts of each batch that is computed."""
    batches = []
    compute = job.Job._compute

    def recording(self, planned, *arguments):
        scores = compute(self, planned, *arguments)
        batches.append(planned.members)
        return scores

    monkeypatch.setattr(job.Job, "_compute", recording)
    return batches


def partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


class Killed(BaseException):
    """Ends a run as SIGKILL would; what the run does on its way out is undone."""


class Killer:
    """Ends a run at its n-th write, of which a part arrives."""

    def __init__(self, monkeypatch, out: Path) -> None:
        self.out, self.writes, self.at, self.part = out, 0, None, 0.0
        self.write = log._write
        monkeypatch.setattr(log, "_write", self)

    def __call__(self, file, data, place=None):
        self.writes += 1
        if self.writes != self.at:
            return self.write(file, data, place)
        self.write(file, data[: round(self.part * len(data))], place)
        self.left = self.out.with_name("left")
        shutil.copytree(partial(self.out), self.left)
        raise Killed

    def kill(self, run, at: int, part: float) -> None:
        self.writes, self.at, self.part = 0, at, part
        with pytest.raises(Killed):
            run()
        self.at = None
        shutil.rmtree(partial(self.out), ignore_errors=True)
        self.left.rename(partial(self.out))


@pytest.mark.parametrize("definition", ["published", "paper"])
@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_a_file_is_what_memory_would_be(definition, keep, model, out):
    options = OPTIONS | {"definition": definition, "keep": keep}
    want = attribute(model, PROMPTS, **options)
    got = attribute(model, PROMPTS, out=out, **options)
    assert_same(got, want)
    assert_same(type(want).load(out), want)
    assert loki.select(got) == loki.select(want)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_killed_at_any_write_it_goes_on_to_the_same_bits(keep, out, monkeypatch, attributed):
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    model = transformers.LlamaForCausalLM(TINIEST).eval()
    want = attribute(model, PROMPTS, keep=keep, **OPTIONS)
    killer = Killer(monkeypatch, out)

    def run():
        return attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS)

    run()
    writes = killer.writes
    chance = random.Random(0)
    spared = 0
    for at in [1, writes, *(chance.randint(1, writes) for _ in range(23))]:
        out.unlink()
        killer.kill(run, at, chance.random())
        assert not out.exists()
        attributed.clear()
        assert_same(run(), want)
        spared += BATCHES - len(attributed)
        assert list(out.parent.iterdir()) == [out]
    assert spared > 20  # about half of the batches


def test_killed_again_and_again(model, out, monkeypatch, attributed):
    """Every process leaves one batch more, and each batch is counted once."""
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    want = attribute(model, PROMPTS, keep="counts", **OPTIONS)
    attributed.clear()
    killer = Killer(monkeypatch, out)
    of_a_batch = 1 + 2 * len(BESIDE)
    for _ in range(BATCHES):
        # the machine's line, a batch, and the first byte of the next
        killer.kill(
            lambda: attribute(model, PROMPTS, keep="counts", out=out, **OPTIONS),
            at=1 + of_a_batch + 1, part=0.5,
        )  # fmt: skip
    assert_same(attribute(model, PROMPTS, keep="counts", out=out, **OPTIONS), want)
    assert len(attributed) <= 2 * BATCHES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_sigkill_and_sigterm(tmp_path, attributed):
    from tests.attribution import killed_worker as worker

    subprocess.run(
        [sys.executable, "-m", worker.__name__, str(tmp_path)], cwd=ROOT, check=True, timeout=120
    )
    model = build_model(device="cpu")
    for keep in ("scores", "counts"):
        out = tmp_path / f"{keep}.safetensors"
        want = attribute(model, worker.PROMPTS, keep=keep, **worker.OPTIONS)
        attributed.clear()
        assert_same(attribute(model, worker.PROMPTS, out=out, keep=keep, **worker.OPTIONS), want)
        assert 0 < len(attributed) < 30 - 4
    assert len(list(tmp_path.iterdir())) == 2


def leave_two_batches(model, out, monkeypatch, **options):
    """A log as a run leaves it that is interrupted in its third batch."""
    compute = job.attribute_batch
    left = [1, 1]

    def two(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(job, "attribute_batch", two)
        with pytest.raises(KeyboardInterrupt):
            attribute(model, PROMPTS, out=out, **(OPTIONS | options))


def configured(model):
    """The same weights, of another function."""
    other = build_model()
    other.load_state_dict(model.state_dict())
    other.config.rms_norm_eps *= 2
    return other


def trained(model):
    other = build_model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[3, 3] += 1
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": trained}, "differs in: model"),
        ({"model": configured}, "differs in: settings"),
        ({"engine": "decode"}, "differs in: engine"),
        ({"steps": 3}, "differs in: steps"),
        ({"definition": "paper"}, "differs in: multiply, objective, rule"),
        ({"batch_size": 3}, "differs in: batch_size"),
        ({"keep": "counts"}, "differs in: criterion, quota"),
        ({"prompts": [*PROMPTS[:-1], {"input_ids": [9] * 6}]}, "differs in: prompts"),
        ({"prompts": [{"input_ids": [8, 9]}]}, "differs in: prompts"),
        ({"target": list(range(8))}, "differs in: prompts"),
        ({"target": list(range(8)), "contrast": [3] * 8}, "differs in: prompts"),
    ],
)
def test_another_run_is_refused_and_the_first_goes_on(
    change, message, model, out, monkeypatch, attributed
):
    want = attribute(model, PROMPTS, **OPTIONS)
    leave_two_batches(model, out, monkeypatch)
    options = OPTIONS | change
    other = options.pop("model", lambda same: same)(model)
    prompts = options.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=message):
        attribute(other, prompts, out=out, **options)
    attributed.clear()
    assert_same(attribute(model, PROMPTS, out=out, **OPTIONS), want)
    assert len(attributed) == BATCHES - 2


def test_a_baseline_that_was_measured_again_is_to_be_saved(model, out, monkeypatch):
    """Another device's last bits are another baseline; other options are no reason to say so."""
    mean = loki.mean_activations(model, PROMPTS[:1])
    leave_two_batches(model, out, monkeypatch, baseline=mean)
    other = mean * (1 + 1e-6)
    with pytest.raises(ValueError, match=r"baseline_values .*save the tensor once"):
        attribute(model, PROMPTS, out=out, **OPTIONS | {"baseline": other})
    with pytest.raises(ValueError, match=r"differs in: baseline_values, steps\. Give"):
        attribute(model, PROMPTS, out=out, **OPTIONS | {"baseline": other, "steps": 2})


def test_answers_and_a_baseline_are_a_part_of_what_goes_on(model, out, monkeypatch):
    mean = loki.mean_activations(model, PROMPTS[:1])
    given = {"target": [[11, 12]] * 8, "contrast": [[3]] * 8, "baseline": mean}
    want = attribute(model, PROMPTS, **OPTIONS | given)
    leave_two_batches(model, out, monkeypatch, **given)
    for change, what in (
        ({"baseline": 2 * mean}, "baseline_values"),
        ({"target": [[11, 13]] * 8}, "prompts"),
        ({"contrast": [[4]] * 8}, "prompts"),
    ):
        with pytest.raises(ValueError, match=f"differs in: {what}"):
            attribute(model, PROMPTS, out=out, **OPTIONS | given | change)
    assert_same(attribute(model, PROMPTS, out=out, **OPTIONS | given), want)


@pytest.mark.parametrize("keep", ["scores", "counts"])
@pytest.mark.parametrize("damage", ["rows", "journal", "tail", "counts", "missing"])
def test_what_is_damaged_is_computed_again(keep, damage, model, out, monkeypatch, attributed):
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    want = attribute(model, PROMPTS, keep=keep, **OPTIONS)
    leave_two_batches(model, out, monkeypatch, keep=keep)
    (journal,) = partial(out).glob("*.jsonl")
    spared = 2
    if damage == "rows":
        values = bytearray((partial(out) / "change").read_bytes())
        first = attributed[0][0]
        values[first * 12] ^= 1
        (partial(out) / "change").write_bytes(values)
        spared = 1
    elif damage == "journal":
        text = journal.read_bytes().replace(b'"batch": 1', b'"batch": 3')
        journal.write_bytes(text)
        # counts are of two batches, one of which is not known any more
        spared = 1 if keep == "scores" else 0
    elif damage == "tail":
        journal.write_bytes(journal.read_bytes() + b'0000ffff {"batch": 2\n\n\x00\xff')
    elif damage == "counts":
        for path in partial(out).glob("*.counts"):
            path.write_bytes(path.read_bytes()[:-3])
            spared = 0
    else:
        (partial(out) / "value").unlink()
        spared = 0
    attributed.clear()
    assert_same(attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS), want)
    assert len(attributed) == BATCHES - spared


@pytest.mark.parametrize(
    ("keep", "unseen"), [("scores", "jsonl"), ("counts", "jsonl"), ("counts", "counts")]
)
def test_what_is_not_seen_at_the_end_makes_no_result(keep, unseen, model, out, monkeypatch):
    """As another machine's file, which NFS may hide for a while: its batches would be left out."""
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    want = attribute(model, PROMPTS, keep=keep, **OPTIONS)
    leave_two_batches(model, out, monkeypatch, keep=keep)
    (file,) = partial(out).glob(f"*.{unseen}")
    hidden = file.with_suffix(".hidden")
    result = log.Log.result

    def hide(*arguments):
        file.rename(hidden)
        return result(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(log.Log, "result", hide)
        with pytest.raises(RuntimeError, match=r"lacks 2 of 4 batches.*same call again"):
            attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS)
    assert not out.exists()
    hidden.rename(file)
    assert_same(attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS), want)


def test_a_damaged_description_is_refused(model, out, monkeypatch):
    leave_two_batches(model, out, monkeypatch)
    path = partial(out) / "run.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run\.json is damaged; delete"):
        attribute(model, PROMPTS, out=out, **OPTIONS)


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_a_disk_that_fills_up(keep, model, out, monkeypatch, attributed):
    want = attribute(model, PROMPTS, keep=keep, **OPTIONS)
    write = log._write
    writes = []

    def full(file, data, place=None):
        writes.append(data)
        if len(writes) < 20:
            return write(file, data, place)
        write(file, data[:3], place)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(log, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS)
    attributed.clear()
    assert_same(attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS), want)
    assert 0 < len(attributed) < BATCHES


def test_only_what_is_beyond_a_file_is_reserved(model, out, monkeypatch):
    """glibc, where a file system has no fallocate, writes zeros into what is asked for."""
    asked = []
    leave_two_batches(model, out, monkeypatch)
    (partial(out) / "value").write_bytes(bytes(12))  # of 3 prompts

    def reserve(handle, begin, length):
        asked.append((os.fstat(handle).st_size, begin, begin + length))

    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    attribute(model, PROMPTS, out=out, **OPTIONS)
    assert (12, 12, 4 * len(PROMPTS)) in asked
    assert all(begin == size for size, begin, _ in asked)


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="the system does not tell what is free")
@pytest.mark.parametrize("free", [0, 2**20, None])
def test_where_others_write_too_room_is_not_taken(free, model, out, monkeypatch, attributed):
    """Zeros of one process may come over what another has written there; a full disk is seen."""
    reserve, written = log.Log.reserve, attribute(model, PROMPTS, **OPTIONS)

    def with_another(self, total):
        alone, self.team = self.team, SimpleNamespace(rank=0, size=2)
        try:
            reserve(self, total)
        finally:
            self.team = alone

    def room(_handle):  # some of FUSE's file systems tell nothing: all is zero
        blocks = (0, 0) if free is None else (free // 512, 10**6)
        return SimpleNamespace(f_frsize=512, f_bavail=blocks[0], f_blocks=blocks[1])

    monkeypatch.setattr(log.Log, "reserve", with_another)
    monkeypatch.setattr(os, "statvfs", room)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("taken"), raising=False)
    if free == 0:
        attributed.clear()
        with pytest.raises(OSError, match="No space left") as raised:
            attribute(model, PROMPTS, out=out, **OPTIONS)
        assert not attributed
        assert raised.value.errno == errno.ENOSPC
        assert list(out.parent.iterdir()) == []
    else:
        assert_same(attribute(model, PROMPTS, out=out, **OPTIONS), written)


@pytest.mark.skipif(sys.platform != "linux", reason="what is synced is read from /proc")
def test_the_file_is_on_the_disk_before_its_log_goes(model, out, monkeypatch):
    """As after a power cut: what has only been renamed may be empty then, or not there."""
    happened = []
    sync, replace, unlink = os.fsync, os.replace, os.unlink

    def record(name, do):
        def recording(first, *others, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if name == "sync" else first
            happened.append((name, Path(path).name))
            return do(first, *others, **options)

        return recording

    monkeypatch.setattr(os, "fsync", record("sync", sync))
    monkeypatch.setattr(os, "replace", record("replace", replace))
    monkeypatch.setattr(os, "unlink", record("unlink", unlink))
    attribute(model, PROMPTS, out=out, **OPTIONS)
    steps = [("sync", "scores"), ("replace", "scores"), ("sync", out.parent.name)]
    assert [step for step in happened if step in steps] == steps
    journals = [i for i, (name, path) in enumerate(happened) if path.endswith(".jsonl")]
    assert journals
    assert min(journals) > happened.index(steps[-1])


def test_killed_before_the_folder_is_removed(model, out, monkeypatch, attributed):
    def killed(_folder):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(log.Log, "_remove", killed)
        with pytest.raises(Killed):
            attribute(model, PROMPTS, out=out, **OPTIONS)
    before = out.read_bytes()
    attributed.clear()
    attribute(model, PROMPTS, out=out, **OPTIONS)
    assert not attributed
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_a_finished_file_is_replaced(model, out):
    attribute(model, PROMPTS, out=out, **OPTIONS)
    other = attribute(model, PROMPTS[:3], out=out, **OPTIONS)
    assert_same(Attribution.load(out), other)


def test_two_processes_do_not_write_one_file(model, out, attributed, monkeypatch):
    compute = job.attribute_batch

    def again(*arguments):
        monkeypatch.setattr(job, "attribute_batch", compute)
        with pytest.raises(RuntimeError, match=r"another process is writing .*result\.safetensors"):
            attribute(build_model(), PROMPTS, out=out, **OPTIONS)
        return compute(*arguments)

    monkeypatch.setattr(job, "attribute_batch", again)
    attribute(model, PROMPTS, out=out, **OPTIONS)


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of Unix")
@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EIO"])
def test_a_file_system_without_locks(code, model, out, monkeypatch, caplog):
    """As some of NFS, Lustre and FUSE are; another error is one."""

    def flock(*_):
        raise OSError(getattr(errno, code), "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    if code == "EIO":
        with pytest.raises(OSError, match="no locks"):
            loki.attribute(model, PROMPTS, out=out, **OPTIONS)
        return
    got = loki.attribute(model, PROMPTS, out=out, **OPTIONS)
    assert_same(got, loki.attribute(model, PROMPTS, **OPTIONS))
    assert caplog.text.count("is not locked") == 1
    assert list(out.parent.iterdir()) == [out]


def test_another_machine_goes_on_with_the_same_batches_and_is_named(
    model, out, monkeypatch, caplog, attributed
):
    options = {"steps": 1}
    monkeypatch.setattr(BatchLimits, "of", lambda *_: BatchLimits(None, 12, 1000))
    want = attribute(model, PROMPTS, **options)
    leave_two_batches(model, out, monkeypatch, batch_size=None)
    monkeypatch.setattr(BatchLimits, "of", lambda *_: BatchLimits(None, 1000, 1000))
    monkeypatch.setattr(job, "describe_machine", lambda _device: {"device": "another one"})
    got = attribute(model, PROMPTS, out=out, **options)
    assert_same(got, want)
    assert "another one" in caplog.text
    assert got.run["machines"][1] == {"device": "another one"}


def test_a_smaller_machine_computes_the_same_batches_in_parts(model, out, monkeypatch):
    """The last batch of three, of two prompts; a CPU that is full has the process ended."""
    options, computed, compute = {"steps": 1}, [], job.attribute_batch
    monkeypatch.setattr(BatchLimits, "of", lambda *_: BatchLimits(None, 15, 1000))
    want = attribute(model, PROMPTS, **options)
    leave_two_batches(model, out, monkeypatch, batch_size=None)

    def recording(engine, batch):
        computed.append(tuple(batch.input_ids.shape))
        return compute(engine, batch)

    monkeypatch.setattr(job, "attribute_batch", recording)
    monkeypatch.setattr(BatchLimits, "of", lambda *_: BatchLimits(None, 3, 3))
    monkeypatch.setattr(fitting, "free_bytes", lambda _device: None)  # a CPU's
    got = attribute(model, PROMPTS, out=out, **options)
    assert computed == [(1, 2), (1, 2)]
    assert got.run == {**want.run, "created": got.run["created"]}
    torch.testing.assert_close(got.scores, want.scores)


@pytest.mark.parametrize("own", [BatchLimits(None, 15, 1000), BatchLimits(2, 3, 3)])
def test_the_batches_that_a_device_plans_itself_are_whole(own):
    """Or that were asked for: of so many prompts on any device."""
    kept = BatchLimits(own.prompts, 15, 1000)
    assert Fitting.of(3, own, kept, torch.device("cpu")).below == math.inf


def test_a_gpu_tries_the_batches_of_one_that_had_more_room(monkeypatch):
    """Its full memory is an error that is caught, and what fits has the same bits."""
    own, kept = BatchLimits(None, 3, 3), BatchLimits(None, 15, 1000)
    assert Fitting.of(3, own, kept, torch.device("cpu")).below < math.inf
    monkeypatch.setattr(fitting, "free_bytes", lambda _device: 1 << 30)
    assert Fitting.of(3, own, kept, torch.device("cuda")).below == math.inf


def test_sigterm_is_handled_as_before_afterwards(model, out):
    handler = signal.getsignal(signal.SIGTERM)
    attribute(model, PROMPTS, out=out, **OPTIONS)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_any_reader_of_safetensors_reads_it(model, out):
    got = attribute(model, PROMPTS, out=out, **OPTIONS)
    with safe_open(out, framework="np") as file:
        assert set(file.keys()) == {"scores", *BESIDE}
        assert (file.get_tensor("scores") == got.scores.numpy()).all()
        assert json.loads(file.metadata()["run"]) == got.run
    assert Attribution.load(out).run == got.run


def test_adapters_in_force_are_known(tmp_path):
    """The weights are all there whichever of them acts."""
    import peft

    config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_model(), config, adapter_name="a")
    model.add_adapter("b", config)
    inner = model.get_base_model()
    found = {model_settings(build_model()), model_settings(inner)}
    model.set_adapter("b")
    found.add(model_settings(inner))
    with model.disable_adapter():
        found.add(model_settings(inner))
    inner.model.layers[0].mlp.up_proj.set_scale("b", 0.5)
    found.add(model_settings(inner))
    assert len(found) == 5


def test_in_another_thread_the_handler_of_sigterm_is_left_alone(model, out):
    before = signal.getsignal(signal.SIGTERM)
    want = attribute(model, PROMPTS, **OPTIONS)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(attribute, model, PROMPTS, out=out, **OPTIONS).result()
    assert_same(got, want)
    assert signal.getsignal(signal.SIGTERM) is before


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    before=st.binary(max_size=30),
    entries=st.lists(st.dictionaries(st.text(max_size=5), st.integers()), min_size=1, max_size=4),
    cut=st.integers(0, 60),
)
def test_a_journal_of_any_bytes_has_the_lines_that_are_whole(tmp_path, before, entries, cut):
    """Something that was written over, lines, and one that was being written."""
    texts = [json.dumps(entry).encode() for entry in entries]
    whole = b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)
    last = b'%08x {"batch": 3}' % zlib.crc32(b'{"batch": 3}')
    cut = min(cut, len(last) - 1)
    (tmp_path / "journal").write_bytes(before + b"\n" + whole + last[:cut])
    assert list(log._read_lines(tmp_path / "journal")) == entries
