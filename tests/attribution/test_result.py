"""The files of a result: mapped, whatever their size, and whole tables."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loki_kernels as loki
from loki_kernels import Attribution, AttributionCounts, files, ranking, report
from loki_kernels.attribution import table
from tests.attribution.results import differing
from tests.models import build_model


def make_result(samples=5, layers=3, width=7, complete=True) -> Attribution:
    generator = torch.Generator().manual_seed(0)
    by_layer = torch.randn(2, samples, layers, generator=generator)
    return Attribution(
        scores=torch.randn(samples, layers, width, generator=generator),
        targets=torch.arange(samples),
        value=torch.rand(samples, generator=generator),
        completeness=by_layer[0] if complete else None,
        change=by_layer[1] if complete else None,
        run={"definition": "published", "steps": 7},
    )


def assert_same(got: Attribution, want: Attribution) -> None:
    assert got.run == want.run
    assert not differing(got, want)


def test_what_is_changed_of_a_definition_is_said():
    """As it was read from the file of an older release too, which may lack a field."""
    result = make_result()
    assert "definition='published', steps=7" in repr(result)
    result.run |= {"objective": "logit", "rule": "midpoint", "path": "last_token"}
    said = "published with objective=logit, rule=midpoint"
    assert f"definition={said!r}" in repr(result)
    assert said in report._result_section("a", result, 10).facts
    assert "definition='mine'" in repr(
        Attribution(**{**vars(result), "run": {"definition": "mine"}})
    )
    assert "definition=None" in repr(Attribution(**{**vars(result), "run": {}}))


def test_adapters_in_force_are_a_part_of_the_run():
    """No weight says which of them act."""
    import peft

    config = peft.LoraConfig(target_modules=["up_proj"], lora_alpha=16, r=8)
    model = peft.get_peft_model(build_model(), config, adapter_name="mine")
    prompts = [{"input_ids": [1, 2, 3]}]
    assert loki.attribute(model, prompts, steps=1).run["adapters"] == ["[('mine', 2.0)]"]
    assert "adapters" not in loki.attribute(model.unload(), prompts, steps=1).run


def write_hole(path, samples, layers, width):
    """A file of scores of which nothing but the header is on the disk."""
    scores = 4 * samples * layers * width
    ends = [scores, scores + 4 * samples, scores + 12 * samples]
    shapes = {"scores": [samples, layers, width], "value": [samples], "targets": [samples]}
    header = {"__metadata__": {"format": "loki-kernels-attribution", "run": "{}"}}
    for name, begin, end in zip(shapes, [0, *ends], ends, strict=False):
        dtype = "I64" if name == "targets" else "F32"
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + ends[-1])


def anonymous_memory() -> int:
    """What this process holds beside files, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and needs files with holes")
def test_a_file_of_100_gb_is_opened_and_read_in_parts(tmp_path):
    path = tmp_path / "huge.safetensors"
    try:
        write_hole(path, samples=38_147, layers=80, width=8192)
    except OSError:
        pytest.skip("the file system has no files of this size")
    assert path.stat().st_size > 100e9
    if path.stat().st_blocks * 512 > 1e9:
        pytest.skip("the file system has no holes")
    before = anonymous_memory()
    result = Attribution.load(path)
    assert result.scores.shape == (38_147, 80, 8192)
    assert result.scores[-1].sum() == 0
    few = Attribution(result.scores[-64:], result.targets[-64:], result.value[-64:])  # 168 MB
    assert loki.select(few).counts == [819] * 80
    assert anonymous_memory() - before < 1.5 * (ranking._CHUNK_ELEMENTS * 4 + (64 << 20))


def test_what_is_written_into_a_loaded_result_stays_in_this_process(tmp_path):
    path = tmp_path / "a.safetensors"
    want = make_result()
    want.save(path)
    Attribution.load(path).scores.zero_()
    assert_same(Attribution.load(path), want)


def test_numbers_at_odd_places_and_no_numbers(tmp_path):
    path = tmp_path / "a.safetensors"
    write_hole(path, samples=3, layers=1, width=2)
    with open(path, "r+b") as file:
        file.seek(-24, os.SEEK_END)  # behind 9 numbers of 4 bytes
        file.write(torch.arange(3).numpy().tobytes())
    assert Attribution.load(path).targets.tolist() == [0, 1, 2]
    make_result(samples=0).save(path)
    assert Attribution.load(path).scores.shape == (0, 3, 7)


def test_where_memory_is_accounted_strictly_it_is_read_only(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    want = make_result()
    want.save(path)

    class Strict(mmap.mmap):
        def __new__(cls, *args, **options):
            if options.get("access") != mmap.ACCESS_READ:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return super().__new__(cls, *args, **options)

    monkeypatch.setattr(files.mmap, "mmap", Strict)
    with pytest.warns(UserWarning, match="not writable"):
        got = Attribution.load(path)
    assert_same(got, want)


@pytest.mark.parametrize("lines", [1, 21, 60, 1 << 20])
@pytest.mark.parametrize("complete", [True, False])
def test_parquet_is_a_table_and_the_result_again(tmp_path, monkeypatch, complete, lines):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(table, "_LINES", lines)
    path = tmp_path / "a.parquet"
    want = make_result(complete=complete)
    want.save(path)
    assert_same(Attribution.load(path), want)
    frame = pandas.read_parquet(path)
    assert list(frame)[:6] == ["prompt", "layer", "node", "score", "target", "value"]
    line = frame.query("prompt == 4 and layer == 1 and node == 5").iloc[0]
    assert line["score"] == want.scores[4, 1, 5]
    assert line["target"] == 4
    assert line["value"] == want.value[4]
    if complete:
        assert line["change"] == want.change[4, 1]
        assert line["completeness"] == want.completeness[4, 1]
    assert (frame["score"].to_numpy().reshape(5, 3, 7) == want.scores.numpy()).all()
    assert loki.select(Attribution.load(path)) == loki.select(want)


def test_a_part_of_a_parquet_file_is_no_result(tmp_path):
    pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    make_result().save(path)
    parquet.write_table(parquet.read_table(path).slice(7), path)
    with pytest.raises(ValueError, match=r"has 98 lines of the 105"):
        Attribution.load(path)


def test_a_parquet_file_in_another_order_is_no_result(tmp_path):
    pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    make_result().save(path)
    table = parquet.read_table(path)
    parquet.write_table(table.sort_by([("score", "descending")]), path)
    with pytest.raises(ValueError, match="in another order"):
        Attribution.load(path)
    parquet.write_table(table.drop_columns(["target"]), path)
    with pytest.raises(ValueError, match="is damaged"):
        Attribution.load(path)


def test_another_hdf5_file_is_no_result(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("dataset")
        file["note"] = "text"
    with pytest.raises(ValueError, match="is damaged"):
        Attribution.load(tmp_path / "a.h5")


def test_parquet_of_no_prompt(tmp_path):
    pytest.importorskip("pyarrow")
    make_result(samples=0).save(tmp_path / "a.parquet")
    assert_same(Attribution.load(tmp_path / "a.parquet"), make_result(samples=0))


def test_parquet_of_something_else(tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"score": [1.0]}).to_parquet(path)
    with pytest.raises(ValueError, match="not one of scores"):
        Attribution.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole parquet"):
        Attribution.load(path)
    with pytest.raises(FileNotFoundError):
        Attribution.load(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"loki-kernels\[parquet\]"):
        make_result().save(tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lacks=st.sets(st.sampled_from(["scores", "targets", "value", "counts", "run", "counted"])),
    more=st.booleans(),
    run=st.sampled_from(["{}", "nonsense", "[" * 100_000]),
)
@pytest.mark.parametrize("kind", [Attribution, AttributionCounts])
def test_a_file_that_lacks_parts_or_has_more_is_damaged(kind, lacks, more, run, tmp_path):
    parts = {"targets": torch.zeros(2, dtype=torch.int64), "value": torch.zeros(2)}
    if kind is Attribution:
        result = kind(scores=torch.zeros(2, 3, 4), **parts)
    else:
        counts = torch.zeros(3, 4, dtype=torch.int64)
        result = kind(counts=counts, quota=10.0, criterion="magnitude", **parts)
    path = tmp_path / "scores.safetensors"
    result.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"run": run}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whole = run == "{}" and not more and lacks.isdisjoint({*tensors, *metadata})
    tensors |= {"more": torch.zeros(1)} if more else {}
    safetensors.torch.save_file(
        {n: x for n, x in tensors.items() if n not in lacks} or {"none": torch.zeros(1)},
        path,
        {n: x for n, x in metadata.items() if n not in lacks},
    )
    if whole:
        assert torch.equal(kind.load(path).targets, parts["targets"])
    else:
        with pytest.raises(ValueError, match=r"scores\.safetensors"):
            kind.load(path)
