"""The command ``loki-kernels``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, get_args

from . import commands
from ._version import __version__
from .options import (
    DEFAULT_CRITERION,
    DEFAULT_DEFINITION,
    DEFAULT_LENGTH,
    DEFAULT_QUOTA,
    DEFAULT_STEPS,
    DEFAULT_TOKENS,
    Criterion,
    DefinitionName,
    EngineName,
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
        getattr(commands, arguments.command)(arguments)
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
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)

    attribute = subparsers.add_parser("attribute", help="attribute a model's answers to FFN nodes")
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
    attribute.add_argument(
        "--engine", choices=get_args(EngineName), help="(default: the first that is exact)"
    )
    _add_selection_options(attribute, "with --keep counts: ")

    select = subparsers.add_parser("select", help="choose rows from an attribution")
    select.add_argument("attribution", help="file written by attribute, or the authors' HDF5 log")
    select.add_argument("out", help="row file to write (.json)")
    _add_selection_options(select)
    select.add_argument("--strategy", choices=get_args(Strategy), default="layer_balanced")
    select.add_argument("--seed", type=int, default=0)

    merge = subparsers.add_parser(
        "merge", help="put the rows of an adapter, or of a checkpoint's side file, into their base"
    )
    merge.add_argument("base", help="folder or hub name of the model that was patched")
    merge.add_argument(
        "checkpoint", help="folder or hub name of an adapter, or folder with loki_rows.update"
    )
    merge.add_argument("out", help="folder to write the merged model to")
    merge.add_argument("--dtype", default="auto", help="of the merged model: auto, float32, ...")
    merge.add_argument(
        "--max-kl", type=float, metavar="NATS",
        help="merge so much of the update as leaves the KL from the base, a token, below this",
    )  # fmt: skip
    merge.add_argument("--texts", help="that the KL is measured on, as for drift")
    merge.add_argument("--device", help="that it is measured on (default: cuda or cpu)")
    merge.add_argument("--tokens", type=int, help=f"to read at most (default: {DEFAULT_TOKENS})")
    merge.add_argument("--length", type=int, help=f"of a chunk (default: {DEFAULT_LENGTH})")

    adapter = subparsers.add_parser(
        "adapter", help="write an untrained adapter, for programs that continue one"
    )
    adapter.add_argument("model", help="folder or hub name of the base model")
    adapter.add_argument("rows", help="row file, or 'all', which --protect protects")
    adapter.add_argument("out", help="folder to write the adapter to")
    adapter.add_argument("--rank", type=int, help="of LoKI*")
    adapter.add_argument("--protect", help="file of a protection that it is trained with")

    _add_protection(subparsers)
    _add_drift(subparsers)

    inspect = subparsers.add_parser(
        "inspect", help="what a model's config says would be trained, and in how much memory"
    )
    inspect.add_argument("model", help="folder or hub name of a language model")

    _add_estimate(subparsers)
    _add_plot(subparsers)

    subparsers.add_parser("env", help="versions, device and live backends")
    subparsers.add_parser("doctor", help="try this installation, in under a minute")
    return parser


def _add_protection(subparsers: Any) -> None:
    protection = subparsers.add_parser(
        "protection", help="estimate the directions that a protected update leaves alone"
    )
    protection.add_argument("model", help="folder or hub name of a causal language model")
    protection.add_argument("out", help="file to write: .safetensors")
    protection.add_argument("--texts", help=".txt or .jsonl (default: the model's own samples)")
    protection.add_argument(
        "--samples", type=int, help="to draw (default: 192, more for wide layers)"
    )
    protection.add_argument("--max-directions", type=int, help="of a layer (default: a fourteenth)")
    protection.add_argument("--share", type=float, help="of the inputs' energy, in place of that")
    protection.add_argument("--earlier", help="a protection whose energy is added")
    protection.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")


def _add_drift(subparsers: Any) -> None:
    drift = subparsers.add_parser(
        "drift", help="how far a model has moved from its base: KL and perplexity, by domain"
    )
    drift.add_argument("base", help="folder or hub name of a causal language model")
    drift.add_argument("tuned", help="the same, or an adapter of any method")
    drift.add_argument(
        "--texts", help=".txt or .jsonl with text or messages, and domain (default: own questions)"
    )
    drift.add_argument("--out", help="also write this .json")
    drift.add_argument("--plot", help="also draw this .png")
    drift.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="to read at most")
    drift.add_argument("--length", type=int, default=DEFAULT_LENGTH, help="tokens of a chunk")
    drift.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    drift.add_argument("--device", help="cuda, cpu or mps (default: cuda where there is one)")


def _add_estimate(subparsers: Any) -> None:
    estimate = subparsers.add_parser("estimate", help="time and memory of an attribution")
    estimate.add_argument("model", help="folder or hub name of a causal language model")
    _add_analysis_options(estimate)
    estimate.add_argument("--gpus", type=int, default=1, help="that share the questions")


def _add_plot(subparsers: Any) -> None:
    plot = subparsers.add_parser("plot", help="a picture or a page of scores and selections")
    plot.add_argument("files", nargs="+", metavar="file", help="of attribute, or a row file")
    plot.add_argument("out", help=".png, or .html: one page that loads nothing else")
    plot.add_argument("--quota", type=float, default=DEFAULT_QUOTA, help="of the heatmap, in %%")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def _add_analysis_options(parser: argparse.ArgumentParser) -> None:
    """What is attributed, how, and on what."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--questions", help="MMLU's csv; jsonl or parquet of questions, messages, prompt or text"
    )
    source.add_argument("--dataset", help="a Hugging Face dataset, NAME or NAME:CONFIG")
    parser.add_argument("--split", help="of the data set (default: test)")
    parser.add_argument(
        "--definition", choices=get_args(DefinitionName), default=DEFAULT_DEFINITION
    )
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda where there is one)")


def _add_selection_options(parser: argparse.ArgumentParser, when: str = "") -> None:
    rows = f"{when}percentage of rows (default: {DEFAULT_QUOTA:g})"
    parser.add_argument("--quota", type=float, help=rows)
    default = f"{when}scores nearest to zero, or the lowest (default: {DEFAULT_CRITERION})"
    parser.add_argument("--criterion", choices=get_args(Criterion), help=default)
