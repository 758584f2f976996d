from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

import loki_kernels as loki
from loki_kernels import launch
from loki_kernels.cli import main
from loki_kernels.discovery import find_structure
from loki_kernels.inspection import load_model
from loki_kernels.ops._directions import padded
from tests import architectures
from tests.architectures import internvl
from tests.models import build_model
from tests.tiny_training import train
from tests.zoo.build import build

PIPES = {"capture_output": True, "text": True}


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """A saved model and a tokenizer that needs no download."""
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").touch()

    class Tokenizer:
        chat_template = None

        def __call__(self, text):
            return {"input_ids": [len(word) for word in text.split()][:20]}

        def save_pretrained(self, folder):
            (folder / "tokenizer.txt").write_text("saved")

    def load(name, **_):
        if not str(name).endswith("model"):  # an adapter's folder has none
            raise OSError("no tokenizer")
        return Tokenizer()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    return tmp_path


@pytest.mark.parametrize("suffix", ["safetensors", "h5"])
def test_attribute_then_select(folder, capsys, suffix):
    questions = folder / "mine.jsonl"
    row = {"question": "Is it?", "choices": ["a", "b", "c", "d"], "answer": 1}
    questions.write_text(json.dumps(row) + "\n")
    scores, rows = folder / f"scores.{suffix}", folder / "rows.json"
    command = ["attribute", str(folder / "model"), str(scores), "--questions", str(questions)]
    assert main([*command, "--definition", "paper"]) == 0
    attribution = loki.Attribution.load(scores)
    assert attribution.run["definition"] == "paper"
    assert attribution.scores.shape == (1, 3, 48)
    assert main(["select", str(scores), str(rows), "--quota", "25"]) == 0
    assert loki.RowSelection.load(rows) == loki.select(attribution, 25)
    assert loki.RowSelection.load(rows).info["attribution"]["definition"] == "paper"
    assert "3 layers, 12 rows each" in capsys.readouterr().out


def test_options_of_the_chat_template(folder, capsys):
    questions, out = folder / "mine.jsonl", folder / "scores.safetensors"
    questions.write_text('{"question": "Is it?", "choices": ["a", "b", "c", "d"], "answer": 1}\n')
    command = ["attribute", str(folder / "model"), str(out), "--questions", str(questions)]
    # This tokenizer has no chat template, which the options would be for.
    assert main([*command, "--chat-template-kwargs", '{"enable_thinking": false}']) == 1
    assert "no prompt is a chat" in capsys.readouterr().err
    for text in ("[1]", "{"):
        with pytest.raises(SystemExit):
            main([*command, "--chat-template-kwargs", text])


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == loki.__version__


def test_counts_are_a_selection_in_the_making(folder, capsys):
    questions, counts, rows = folder / "mine.jsonl", folder / "c.safetensors", folder / "rows.json"
    questions.write_text('{"question": "Is it?", "choices": ["a", "b", "c", "d"], "answer": 1}\n')
    command = ["attribute", str(folder / "model"), str(counts), "--questions", str(questions)]
    command += ["--keep", "counts", "--quota", "25", "--criterion", "signed"]
    assert main(command) == 0
    assert main(["select", str(counts), str(rows)]) == 0
    assert loki.RowSelection.load(rows).info["criterion"] == "signed"
    assert "3 layers, 12 rows each" in capsys.readouterr().out
    command[2] = str(counts.with_suffix(".h5"))
    assert main(command) == 1
    assert main(["select", str(counts), str(rows), "--quota", "5"]) == 1


def test_protection(folder, capsys):
    texts, out = folder / "mine.jsonl", folder / "protection.safetensors"
    texts.write_text("".join(f'{{"text": "a text of {n * "words "}"}}\n' for n in range(2, 12)))
    command = ["protection", str(folder / "model"), str(out), "--texts", str(texts)]
    assert main([*command, "--share", "0.8", "--max-directions", "5"]) == 0
    assert "Protection(3 layers" in capsys.readouterr().out
    protection = loki.Protection.load(out)
    assert protection.info["texts"] == "given"
    assert (protection.info["share"], protection.info["max_directions"]) == (0.8, 5)
    assert max(directions.shape[1] for directions in protection.directions.values()) <= 5
    again = folder / "again.safetensors"
    command[2] = str(again)
    assert main([*command, "--earlier", str(out)]) == 0
    assert loki.Protection.load(again).info["earlier"] == protection.fingerprint


def test_merge(folder):
    model = build_model()
    loki.patch(model, [[1], [2], [3]], rank=2)
    train(model)
    model.save_pretrained(folder / "trained")
    command = ["merge", str(folder / "model"), str(folder / "trained"), str(folder / "merged")]
    assert main(command) == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    trained = model.state_dict()
    for name, tensor in merged.items():
        assert torch.equal(trained[name], tensor)
    assert (folder / "merged" / "tokenizer.txt").read_text() == "saved"
    assert main(command) == 1  # the folder is not empty any more


@pytest.mark.parametrize("error", [None, ImportError("no library of images"), KeyError("own")])
def test_a_processor_is_merged_along(error, folder, monkeypatch, caplog):
    class Processor:
        def save_pretrained(self, path):
            (path / "processor.txt").write_text("with the tokenizer")

    def load(*_, **__):
        if error is not None:
            raise error
        return Processor()

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", load)
    model = build_model()
    loki.patch(model, [[1], [2], [3]])
    loki.save_adapter(model, folder / "adapter")
    out = folder / "merged"
    assert main(["merge", str(folder / "model"), str(folder / "adapter"), str(out)]) == 0
    found = "processor.txt" if error is None else "tokenizer.txt"
    assert [path.name for path in out.glob("*.txt")] == [found]
    assert ("no processor was copied" in caplog.text) == (error is not None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["select", "no.safetensors", "rows.json"], "no.safetensors does not exist"),
        (["select", "no.safetensors", "/no/such/rows.json"], "does not exist"),
        (["attribute", "model", "scores.bin"], "save to .safetensors"),
        (["attribute", "model", "s.h5", "--questions", "q.txt"], "read from .csv or .jsonl"),
        (["attribute", "model", "s.h5", "--dtype", "nn"], "not a torch dtype"),
        (["protection", "model", "p.bin"], "must end in .safetensors"),
        (["protection", "model", "p.safetensors", "--texts", "none.txt"], "none.txt"),
    ],
)
def test_errors_are_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_hdf5_without_h5py_fails_before_the_analysis(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("loki_kernels.inspection.load_model", lambda *_: pytest.fail("it loaded"))
    assert main(["attribute", str(folder / "model"), str(folder / "scores.h5")]) == 1
    assert "need h5py" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert "count_lowest" in out


def test_adapter_to_start_from(base_folder, tmp_path, capsys):
    import loki_kernels as loki

    rows = tmp_path / "rows.json"
    rows.write_text("[[1, 5, 40], [0], [7, 3]]")
    assert main(["adapter", str(base_folder), str(rows), str(tmp_path / "adapter")]) == 0
    assert "3 down-projections patched" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    merged = loki.load_adapter(base, tmp_path / "adapter").merge().state_dict()
    assert all(torch.equal(merged[k], v) for k, v in before.items())
    assert main(["adapter", str(base_folder), str(rows), str(tmp_path / "no" / "folder")]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["all", "rows.json"])
def test_a_protected_adapter_to_start_from(rows, base_folder, tmp_path):
    import peft

    import loki_kernels as loki

    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    protection = loki.estimate_protection(base, [list(range(3, 80))], share=0.7)
    file = tmp_path / "protection.safetensors"
    protection.save(file)
    (tmp_path / "rows.json").write_text("[[1, 5, 40], [0], [7, 3]]")
    rows, out = rows if rows == "all" else str(tmp_path / rows), tmp_path / "adapter"
    assert main(["adapter", str(base_folder), rows, str(out), "--protect", str(file)]) == 0
    model = peft.PeftModel.from_pretrained(base, out, is_trainable=True)  # as LLaMA-Factory does
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert len(layer.loki_index["default"]) == (base.config.hidden_size if rows == "all" else 3)
    name = "model.layers.0.mlp.down_proj"
    kept = padded(protection.directions[name])
    torch.testing.assert_close(layer.loki_directions["default"], kept)


def test_launch_registers_before_the_program_runs(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(
        "import peft, sys\n"
        "assert 'LOKI' in list(peft.PeftType) and __name__ == '__main__'\n"
        "print(sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "loki_kernels.launch"]
    ran = subprocess.run([*command, "program", "-x", "1"], cwd=tmp_path, **PIPES)
    assert ran.stdout.strip() == "['-x', '1']", ran.stderr
    monkeypatch.setattr(sys, "argv", ["launch", "-x"])
    with pytest.raises(SystemExit, match="usage:"):
        launch.main()


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--strategy", "random", "--seed", "3"], {"strategy": "random", "seed": 3}),
        (["--strategy", "global_lowest"], {"strategy": "global_lowest"}),
        (["--criterion", "signed"], {"criterion": "signed"}),
    ],
)
def test_how_to_select(options, chosen, folder):
    attribution = loki.attribute(build_model(), [{"input_ids": [3, 4, 5]}] * 3, steps=2)
    attribution.save(folder / "scores.safetensors")
    scores, rows = str(folder / "scores.safetensors"), folder / "rows.json"
    assert main(["select", scores, str(rows), "--quota", "25", *options]) == 0
    assert loki.RowSelection.load(rows) == loki.select(attribution, 25, **chosen)
    assert loki.RowSelection.load(rows) != loki.select(attribution, 25)


def test_a_dataset_and_another_site(folder, capsys):
    records = [{"text": "Is it " + "so " * n} for n in range(1, 5)]
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = folder / "scores.safetensors"
    command = ["attribute", str(folder / "model"), str(out), "--steps", "1"]
    assert main([*command, "--dataset", str(folder / "data"), "--site", "ffn_neurons"]) == 0
    assert loki.Attribution.load(out).scores.shape == (4, 3, 112)
    (folder / "data" / "train.jsonl").write_text('{"text": "Is it so"}\n')
    assert main([*command, "--dataset", str(folder / "data"), "--split", "train"]) == 0
    assert loki.Attribution.load(out).scores.shape == (1, 3, 48)
    assert main([*command, "--split", "train"]) == 1
    assert "--split belongs to --dataset" in capsys.readouterr().err


def test_an_adapter_of_low_rank(base_folder, tmp_path, capsys):
    out = tmp_path / "identity"
    command = ["adapter", str(base_folder), "all", str(out), "--rank", "2"]
    assert main(command) == 1
    assert "name a file (--protect FILE)" in capsys.readouterr().err
    assert not out.exists()
    texts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    loki.estimate_protection(load_model(base_folder), texts).save(tmp_path / "p.safetensors")
    assert main([*command, "--protect", str(tmp_path / "p.safetensors")]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["rank"] == 2


def test_a_model_of_images_is_loaded_as_it_was_saved(base_folder, tmp_path):
    """`AutoModelForCausalLM` knows none of this kind."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    model = internvl()
    model.save_pretrained(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3 w4\n\nw5 w6 w7")
    out = tmp_path / "protection.safetensors"
    assert main(["protection", str(tmp_path), str(out), "--texts", str(texts)]) == 0
    protection = loki.Protection.load(out)
    names = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert list(protection.directions) == names
    loki.patch(model, [[1], [2], [3]], protect=protection)


def test_a_protection_fits_the_text_model_and_the_whole_one(tmp_path):
    """transformers has a class for each, whose layers have other names."""
    whole = zoo_qwen()
    whole.save_pretrained(tmp_path)
    text = load_model(tmp_path)
    assert type(text) is not type(whole)
    texts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    one, other = (loki.estimate_protection(m, texts) for m in (text, whole))
    assert one.directions.keys() != other.directions.keys()
    for model, protection in ((whole, one), (text, other)):
        handle = loki.patch(model, quota=100, protect=protection)
        assert handle.protection.fingerprint == protection.fingerprint
        for name, layer in handle.named_layers():
            (known,) = (
                k for k in protection.directions if k.endswith(name[name.find("layers.") :])
            )
            assert torch.equal(
                layer.directions, padded(protection.directions[known]).to(layer.directions)
            )
    short = dict(list(one.directions.items())[:-1])
    with pytest.raises(ValueError, match="of another model: it lacks"):
        loki.Protection(short, one.energies, one.totals).of(find_structure(zoo_qwen()))


def test_the_class_is_the_first_that_knows_the_config(tmp_path):
    """Or the first whose modules are those of an update."""
    for make in (architectures.qwen_vl, architectures.gemma4, zoo_qwen):
        model = make()
        model.save_pretrained(tmp_path / type(model).__name__)
        names = [down.name for down in find_structure(model).projections()]
        loaded = load_model(tmp_path / type(model).__name__, holding=names)
        assert type(loaded) is type(model)
        first = load_model(tmp_path / type(model).__name__)
        assert "lm_head" in dict(first.named_modules())


def zoo_qwen():
    """Of which transformers has a class for text too, whose layers have other names."""
    return build("Qwen3_5ForConditionalGeneration")


def test_a_whole_model_s_update_is_merged_into_the_whole_model(base_folder, tmp_path):
    model = zoo_qwen()
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / name, folder)
    loki.patch(model, [[1], [2], [3], [0]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("update"):
                parameter.normal_()
    loki.save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "merged"
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(out)]) == 0
    merged = type(model).from_pretrained(out).state_dict()
    trained = model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in merged.items())


def test_the_tokenizer_that_was_trained_with_is_merged_along(base_folder, tmp_path, capsys):
    """A base has often no chat template; tokens that were added have no embeddings there."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base_folder, base)
    (base / "tokenizer.model").write_text("of sentencepiece")  # llama.cpp's converter wants it
    loki.patch(model, [[1], [2], [3]])
    train(model).save_pretrained(tmp_path / "trained")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "trained")
    texts = tmp_path / "chats.jsonl"
    texts.write_text('{"messages": [{"role": "user", "content": "a b c d e"}]}\n')
    command = ["merge", str(base), str(tmp_path / "trained"), str(out)]
    assert main([*command, "--max-kl", "100", "--texts", str(texts)]) == 0
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert (out / "tokenizer.model").read_text() == "of sentencepiece"
    tokenizer.add_tokens([f"<new{n}>" for n in range(model.config.vocab_size)])
    tokenizer.save_pretrained(tmp_path / "trained")
    command[-1] = str(tmp_path / "again")
    assert main(command) == 1
    assert "they were added before training" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("own", "command"),
    [
        ("config", "inspect"),
        ("config", "estimate"),
        ("config", "attribute"),
        ("config", "drift"),
        ("class", "attribute"),
        ("tokenizer", "estimate"),
        ("tokenizer", "attribute"),
        ("tokenizer", "protection"),
    ],
)
def test_nobody_is_asked_whether_a_model_s_own_code_may_run(
    own, command, base_folder, tmp_path, capsys, monkeypatch
):
    """By default transformers asks a terminal for 15 s, and runs what it finds on a yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "no")
    folder = shutil.copytree(base_folder, tmp_path / "model")
    kinds = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    if own == "tokenizer":
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": kinds}))
    else:  # of a class that transformers has, it knows no language model of CLIP's config
        kinds = {"AutoModelForCausalLM": "own.Model"} if own == "class" else kinds
        config = {"model_type": "clip" if own == "class" else "own", "auto_map": kinds}
        (folder / "config.json").write_text(json.dumps(config))
    rest = {
        "attribute": [str(tmp_path / "out.safetensors")],
        "protection": [str(tmp_path / "out.safetensors")],
        "drift": [str(base_folder)],
    }
    assert main([command, str(folder), *rest.get(command, [])]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert not asked


def test_any_failure_is_one_line(folder, capsys, monkeypatch):
    """safetensors' own errors are of no common kind, and consoles lack letters."""
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["attribute", str(folder / "model"), str(folder / "s.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("loki-kernels attribute: ")
    assert "Traceback" not in error


def test_a_console_without_the_letters(tmp_path):
    script = "import sys; from loki_kernels import cli; cli.main(['env']); print('\ufffd \u4e16')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    run = subprocess.run([sys.executable, "-c", script], **PIPES, env=environment, check=True)
    assert "\\ufffd \\u4e16" in run.stdout


@pytest.fixture
def recorded(folder, monkeypatch):
    """The keywords with which the command line calls what does the work, under its name."""
    calls = {}

    def record(path, result):
        def called(*arguments, **options):
            calls[path.rpartition(".")[2]] = (arguments, options)
            return result

        monkeypatch.setattr(f"loki_kernels.{path}", called)

    class Result:
        def save(self, path):
            pass

    class Model:
        def to(self, device):
            calls["to"] = ((device,), {})

        def merge(self):
            return self

        def save_pretrained(self, path):
            path.mkdir()

    handle = SimpleNamespace(model=Model(), merge=Model)
    group = SimpleNamespace(kl=0.25)
    record("inspection.load_model", handle.model)
    record("attribution.attribute", Result())
    record("protection.estimate_protection", Result())
    record("forgetting.drift", Result())
    record("forgetting.limit_drift", (0.5, SimpleNamespace(overall=group, left_out=0)))
    record("estimate.estimate", "an estimate")
    record("training.adapter_file.read_saved", SimpleNamespace(modules={"a"}))
    record("training.patching.patch_saved", handle)
    return calls


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (
            ["attribute", "{model}", "{folder}/s.safetensors"],
            ["--dtype", "bfloat16", "--device", "meta", "--batch-size", "3", "--engine", "decode"],
            {
                "load_model": ("{model}", "bfloat16"),
                "to": ("meta",),
                "attribute": {"batch_size": 3, "steps": 7, "engine": "decode"},
            },
        ),
        (
            ["merge", "{model}", "{folder}/adapter", "{folder}/merged"],
            ["--dtype", "bfloat16", "--max-kl", "0.3", "--device", "meta"],
            {
                "load_model": ("{model}", "bfloat16", {"a"}),
                "to": ("meta",),
                "read_saved": ("{folder}/adapter",),
                "limit_drift": (0.3, None),
            },
        ),
        (
            ["protection", "{model}", "{folder}/p.safetensors"],
            ["--samples", "5", "--dtype", "float16"],
            {
                "load_model": ("{model}", "float16"),
                "estimate_protection": {"samples": 5, "share": None, "max_directions": None},
            },
        ),
        (
            ["drift", "{model}", "{folder}/tuned"],
            ["--tokens", "40", "--length", "9", "--device", "meta", "--dtype", "float16"],
            {
                "drift": {"tokens": 40, "length": 9, "device": "meta", "dtype": "float16"},
            },
        ),
        (
            ["estimate", "{model}"],
            ["--dtype", "float16", "--definition", "paper", "--device", "meta", "--gpus", "4"],
            {
                "estimate": {
                    "dtype": "float16",
                    "definition": "paper",
                    "device": "meta",
                    "gpus": 4,
                },
            },
        ),
    ],
    ids=["attribute", "merge", "protection", "drift", "estimate"],
)
def test_options_reach_what_they_are_for(command, options, expected, folder, recorded):
    names = {"model": str(folder / "model"), "folder": str(folder)}

    def filled(value):
        return value.format(**names) if isinstance(value, str) else value

    assert main([*map(filled, command), *options]) == 0
    for name, wanted in expected.items():
        arguments, keywords = recorded[name]
        if isinstance(wanted, dict):
            assert {key: keywords[key] for key in wanted} == wanted
        else:
            assert arguments[-len(wanted) :] == tuple(map(filled, wanted))


def test_a_dataset_is_what_is_estimated(folder, recorded):
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text('{"text": "Is it so"}\n{"text": "Is it"}\n')
    assert main(["estimate", str(folder / "model"), "--dataset", str(folder / "data")]) == 0
    (_, questions), _ = recorded["estimate"]
    assert len(list(questions)) == 2


def test_an_interrupt_is_no_error(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("loki_kernels.environment.environment", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == ""
