"""The command ``loki-kernels``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from .options import (
    DEFAULT_CRITERION,
    DEFAULT_QUOTA,
    DEFAULT_SAMPLES,
    Criterion,
    DefinitionName,
    Keep,
    Site,
    Strategy,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 1 after a message on what was wrong."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # tokens of any script, into any console or file
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger(f"{__package__}.attribution").setLevel(logging.INFO)  # how long it takes
    try:
        arguments.run(arguments)
    except Exception as error:  # transformers' and safetensors' own are of no common kind
        notes = getattr(error, "__notes__", [])
        expected = isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError))
        said = error if expected else f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).debug("%s", error, exc_info=True)
        print(f"loki-kernels {arguments.command}: {said}", *notes, sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loki-kernels",
        description="Fine-tune a language model in the weights its knowledge depends on least.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    attribute = commands.add_parser("attribute", help="attribute a model's answers to FFN nodes")
    attribute.add_argument("model", help="folder or hub name of a causal language model")
    attribute.add_argument("out", help="file to write: .safetensors, .h5, .hdf5, .parquet")
    _add_analysis_options(attribute)
    attribute.add_argument("--site", choices=get_args(Site), default="down_proj")
    attribute.add_argument(
        "--chat-template-kwargs", type=_json_object, metavar="JSON",
        help="for the tokenizer's chat template, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip
    attribute.add_argument(
        "--keep", choices=get_args(Keep), default="scores",
        help="counts: only what one later select needs, a small file for any number of questions",
    )  # fmt: skip
    _add_selection_options(attribute)
    attribute.set_defaults(run=_attribute)

    select = commands.add_parser("select", help="choose rows from an attribution")
    select.add_argument("attribution", help="file written by attribute, or the authors' HDF5 log")
    select.add_argument("out", help="row file to write (.json)")
    _add_selection_options(select)
    select.add_argument("--strategy", choices=get_args(Strategy), default="layer_balanced")
    select.add_argument("--seed", type=int, default=0)
    select.set_defaults(run=_select)

    merge = commands.add_parser(
        "merge", help="put the rows of an adapter, or of a checkpoint's side file, into their base"
    )
    merge.add_argument("base", help="folder or hub name of the model that was patched")
    merge.add_argument("checkpoint", help="adapter, or folder with loki_rows.update")
    merge.add_argument("out", help="folder to write the merged model to")
    merge.add_argument("--dtype", default="auto", help="of the merged model: auto, float32, ...")
    merge.add_argument(
        "--max-kl", type=float, metavar="NATS",
        help="merge so much of the update as leaves the KL from the base, a token, below this",
    )  # fmt: skip
    merge.add_argument("--texts", help="that the KL is measured on, as for drift")
    merge.add_argument("--device", help="that it is measured on (default: cuda or cpu)")
    merge.set_defaults(run=_merge)

    adapter = commands.add_parser(
        "adapter", help="write an untrained adapter, for programs that continue one"
    )
    adapter.add_argument("model", help="folder or hub name of the base model")
    adapter.add_argument("rows", help="row file, or 'all', which --protect protects")
    adapter.add_argument("out", help="folder to write the adapter to")
    adapter.add_argument("--rank", type=int, help="of LoKI*")
    adapter.add_argument("--protect", help="file of a protection that it is trained with")
    adapter.set_defaults(run=_adapter)

    _add_protection(commands)
    _add_drift(commands)

    inspect = commands.add_parser(
        "inspect", help="what would be trained and attributed in a model, from its config alone"
    )
    inspect.add_argument("model", help="folder or hub name of a language model")
    inspect.set_defaults(run=_inspect)

    _add_estimate(commands)
    _add_plot(commands)

    environment = commands.add_parser("env", help="versions, device and live backends")
    environment.set_defaults(run=_env)

    doctor = commands.add_parser("doctor", help="try this installation, in under a minute")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_protection(commands: Any) -> None:
    protection = commands.add_parser(
        "protection", help="estimate the directions that a protected update leaves alone"
    )
    protection.add_argument("model", help="folder or hub name of a causal language model")
    protection.add_argument("out", help="file to write: .safetensors")
    protection.add_argument("--texts", help=".txt or .jsonl (default: the model's own samples)")
    protection.add_argument("--samples", type=int, default=DEFAULT_SAMPLES, help="to draw")
    protection.add_argument("--max-directions", type=int, help="of a layer (default: a fourteenth)")
    protection.add_argument("--share", type=float, help="of the inputs' energy, in place of that")
    protection.add_argument("--earlier", help="a protection whose energy is added")
    protection.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    protection.set_defaults(run=_protection)


def _add_drift(commands: Any) -> None:
    drift = commands.add_parser(
        "drift", help="how far a model has moved from its base: KL and perplexity, by domain"
    )
    drift.add_argument("base", help="folder or hub name of a causal language model")
    drift.add_argument("tuned", help="the same, or an adapter of any method")
    drift.add_argument(
        "--texts", help=".txt or .jsonl with text or messages, and domain (default: own questions)"
    )
    drift.add_argument("--out", help="also write this .json")
    drift.add_argument("--plot", help="also draw this .png")
    drift.add_argument("--tokens", type=int, default=20_000, help="to read at most")
    drift.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    drift.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    drift.add_argument("--device", help="cuda, cpu or mps (default: cuda where there is one)")
    drift.set_defaults(run=_drift)


def _add_estimate(commands: Any) -> None:
    estimate = commands.add_parser("estimate", help="time and memory of an attribution")
    estimate.add_argument("model", help="folder or hub name of a causal language model")
    _add_analysis_options(estimate)
    estimate.add_argument("--gpus", type=int, default=1, help="that share the questions")
    estimate.set_defaults(run=_estimate)


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser("plot", help="a picture or a page of scores and selections")
    plot.add_argument("files", nargs="+", metavar="file", help="of attribute, or a row file")
    plot.add_argument("out", help=".png, or .html: one page that loads nothing else")
    plot.add_argument("--quota", type=float, default=DEFAULT_QUOTA, help="of the heatmap, in %%")
    plot.set_defaults(run=_plot)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def _add_analysis_options(parser: argparse.ArgumentParser) -> None:
    """What is attributed, how, and on what."""
    add_question_options(parser)
    parser.add_argument("--definition", choices=get_args(DefinitionName), default="published")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda where there is one)")


def _add_selection_options(parser: argparse.ArgumentParser) -> None:
    rows = f"percentage of rows (default: {DEFAULT_QUOTA:g})"
    parser.add_argument("--quota", type=float, help=rows)
    default = f"(default: {DEFAULT_CRITERION})"
    parser.add_argument("--criterion", choices=get_args(Criterion), help=default)


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """``--questions`` and ``--dataset``, which `questions_of` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--questions", help="your own questions: MMLU's csv, jsonl or parquet")
    source.add_argument("--dataset", help="a Hugging Face dataset, NAME or NAME:CONFIG")


def questions_of(arguments: argparse.Namespace) -> Any:
    """The user's own questions or other prompts, as a stream, or None."""
    from .questions import PromptStream

    if arguments.questions:
        return PromptStream.of_file(arguments.questions)
    if arguments.dataset:
        return PromptStream.of_dataset(arguments.dataset)
    return None


def _join_processes() -> bool:
    """Join those that torchrun has started; whether this is the first of all."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")  # what is exchanged is on the CPU
    return torch.distributed.get_rank() == 0


def _attribute(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from .attribution import attribute
    from .attribution.result import check_suffix
    from .files import check_writable
    from .inspection import load_model
    from .questions import load_questions

    suffix = check_suffix(check_writable(arguments.out))
    if arguments.keep == "counts" and suffix != ".safetensors":
        raise ValueError("--keep counts writes .safetensors.")
    questions = questions_of(arguments)
    questions = load_questions() if questions is None else questions
    first = _join_processes()
    model = load_model(arguments.model, arguments.dtype)
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    result = attribute(
        model,
        questions,
        tokenizer=tokenizer,
        chat_template_kwargs=arguments.chat_template_kwargs,
        definition=arguments.definition,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        site=arguments.site,
        keep=arguments.keep,
        quota=arguments.quota,
        criterion=arguments.criterion,
        out=arguments.out if suffix == ".safetensors" else None,
    )
    if not first:
        return
    if suffix != ".safetensors":
        result.save(arguments.out)
    print(f"{result} -> {arguments.out}")


def _select(arguments: argparse.Namespace) -> None:
    from .attribution.result import load_result
    from .files import check_writable
    from .selection import select

    check_writable(arguments.out)
    rows = select(
        load_result(arguments.attribution),
        arguments.quota,
        arguments.strategy,
        arguments.criterion,
        arguments.seed,
    )
    rows.save(arguments.out)
    print(f"{rows} -> {arguments.out}")


def _protection(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from .files import check_writable
    from .forgetting.texts import encode, read_texts
    from .inspection import load_model
    from .protection import Protection, estimate_protection

    check_writable(arguments.out, ".safetensors")
    found = read_texts(arguments.texts) if arguments.texts else None
    earlier = Protection.load(arguments.earlier) if arguments.earlier else None
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    result = estimate_protection(
        load_model(arguments.model, arguments.dtype),
        None if found is None else [encode(text, tokenizer).tolist() for text in found],
        tokenizer=tokenizer,
        samples=arguments.samples,
        share=arguments.share,
        max_directions=arguments.max_directions,
        earlier=earlier,
    )
    result.save(arguments.out)
    print(f"{result} -> {arguments.out}")


def _merge(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from .files import check_folder
    from .forgetting import limit_drift
    from .forgetting.limit import check_limit
    from .forgetting.texts import read_texts
    from .inspection import load_model
    from .training.adapter_file import modules_of, read_saved
    from .training.patching import patch_saved

    out = check_folder(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new folder.")
    if arguments.max_kl is None:
        if arguments.texts or arguments.device:
            raise ValueError("--texts and --device belong to --max-kl.")
    else:
        check_limit(arguments.max_kl)
        read_texts(arguments.texts)
    saved = read_saved(arguments.checkpoint)
    held = {*saved.layers, *modules_of(saved.others)}
    handle = patch_saved(load_model(arguments.base, arguments.dtype, held), saved)
    if arguments.max_kl is not None:
        handle.model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        share, left = limit_drift(handle, arguments.max_kl, arguments.texts, tokenizer=tokenizer)
        if not share:
            raise ValueError(
                f"no share of the update that was tried keeps the KL below {arguments.max_kl:g}: "
                "nothing is written. Allow more, or train at a lower rate."
            )
        print(f"{share:.3g} of the update is kept, KL {left.overall.kl:.3g} from the base")
    model: Any = handle.merge()
    model.save_pretrained(out)
    try:
        AutoTokenizer.from_pretrained(arguments.base).save_pretrained(out)
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("no tokenizer was copied: %s", error)
    print(f"merged model -> {out}")


def _adapter(arguments: argparse.Namespace) -> None:
    from .files import check_folder
    from .inspection import load_model
    from .selection import RowSelection
    from .training.adapters import save_adapter
    from .training.patching import patch

    check_folder(arguments.out)
    every = arguments.rows == "all"
    if every and not arguments.protect:
        raise ValueError(
            "all rows are trained protected: name a file (--protect FILE), which loki-kernels "
            "protection MODEL FILE writes, or a row file in place of 'all'."
        )
    chosen: Any = {"quota": 100} if every else {"rows": RowSelection.load(arguments.rows)}
    model = load_model(arguments.model, "auto")
    handle = patch(model, rank=arguments.rank, protect=arguments.protect, **chosen)
    folder = save_adapter(handle.model, arguments.out)
    print(f"{handle.report}\n{handle.rows} -> {folder}")


def _drift(arguments: argparse.Namespace) -> None:
    from .files import check_writable
    from .forgetting import drift
    from .plots import import_matplotlib

    for path, suffix in ((arguments.out, ".json"), (arguments.plot, ".png")):
        if path:
            check_writable(path, suffix)
    if arguments.plot:
        import_matplotlib()
    result = drift(
        arguments.base,
        arguments.tuned,
        arguments.texts,
        tokens=arguments.tokens,
        length=arguments.length,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    if arguments.out:
        result.save(arguments.out)
    if arguments.plot:
        result.plot(arguments.plot)
    print(result)


def _inspect(arguments: argparse.Namespace) -> None:
    from .inspection import inspect_model

    print(inspect_model(arguments.model))


def _estimate(arguments: argparse.Namespace) -> None:
    from .estimate import estimate

    print(
        estimate(
            arguments.model,
            questions_of(arguments),
            gpus=arguments.gpus,
            definition=arguments.definition,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=arguments.dtype,
        )
    )


def _plot(arguments: argparse.Namespace) -> None:
    from .report import plot_files

    plot_files(arguments.files, arguments.out, arguments.quota)
    print(f"{', '.join(arguments.files)} -> {arguments.out}")


def _env(_arguments: argparse.Namespace) -> None:
    from .environment import environment

    for name, value in environment().items():
        print(f"{name:16} {value}")


def _doctor(_arguments: argparse.Namespace) -> None:
    from .doctor import examine

    failed = []
    for check in examine():
        print(check, flush=True)
        if check.status == "FAIL":
            failed.append(check.name)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}.")
