"""What the commands of ``loki-kernels`` do; each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def _questions_of(arguments: argparse.Namespace) -> Any:
    """The user's own questions or other prompts, as a stream, or None."""
    from .questions import PromptStream

    if arguments.split and not arguments.dataset:
        raise ValueError("--split belongs to --dataset.")
    if arguments.questions:
        return PromptStream.of_file(arguments.questions)
    if arguments.dataset:
        return PromptStream.of_dataset(arguments.dataset, arguments.split or "test")
    return None


def _join_processes() -> bool:
    """Join those that torchrun has started; whether this is the first of all."""
    import torch

    from .sharding import is_first

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")  # what is exchanged is on the CPU
    return is_first()


def attribute(arguments: argparse.Namespace) -> None:
    from . import attribution
    from .attribution.result import check_suffix
    from .files import check_writable
    from .inspection import load_model
    from .placement import device_to_use
    from .questions import load_questions
    from .tokenizing import load_tokenizer

    check_writable(arguments.out)
    suffix = check_suffix(arguments.out)
    if arguments.keep == "counts" and suffix != ".safetensors":
        raise ValueError("--keep counts writes .safetensors.")
    questions = _questions_of(arguments)
    questions = load_questions() if questions is None else questions
    first = _join_processes()
    model = load_model(arguments.model, arguments.dtype)
    model.to(device_to_use(arguments.device))
    tokenizer = load_tokenizer(arguments.model)
    result = attribution.attribute(
        model,
        questions,
        tokenizer=tokenizer,
        chat_template_kwargs=arguments.chat_template_kwargs,
        definition=arguments.definition,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        engine=arguments.engine,
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


def select(arguments: argparse.Namespace) -> None:
    from . import selection
    from .attribution.result import load_result
    from .files import check_writable

    check_writable(arguments.out, ".json")
    rows = selection.select(
        load_result(arguments.attribution),
        arguments.quota,
        arguments.strategy,
        arguments.criterion,
        arguments.seed,
    )
    rows.save(arguments.out)
    print(f"{rows} -> {arguments.out}")


def protection(arguments: argparse.Namespace) -> None:
    from .files import check_writable
    from .forgetting.texts import encode, read_texts
    from .inspection import load_model
    from .protection import Protection, estimate_protection
    from .tokenizing import load_tokenizer

    check_writable(arguments.out, ".safetensors")
    if arguments.texts and arguments.samples:
        raise ValueError(
            "--samples are drawn where no --texts are given; leave one of the two out."
        )
    found = read_texts(arguments.texts) if arguments.texts else None
    earlier = Protection.load(arguments.earlier) if arguments.earlier else None
    tokenizer = load_tokenizer(arguments.model)
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


def merge(arguments: argparse.Namespace) -> None:
    from .files import check_folder
    from .forgetting import limit_drift
    from .forgetting.limit import check_limit
    from .forgetting.meter import check_positive
    from .forgetting.models import find_own_tokenizer, tokenizer_of_pair
    from .forgetting.texts import read_texts
    from .inspection import load_model
    from .placement import device_to_use
    from .training.adapter_file import read_saved
    from .training.patching import patch_saved

    out = check_folder(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new folder.")
    given = {name: getattr(arguments, name) for name in ("length", "tokens")}
    sizes = {name: size for name, size in given.items() if size is not None}
    if arguments.max_kl is None:
        if arguments.texts or arguments.device or sizes:
            raise ValueError("--texts, --device, --tokens and --length belong to --max-kl.")
    else:
        check_limit(arguments.max_kl)
        check_positive(**sizes)
        read_texts(arguments.texts)
    saved = read_saved(arguments.checkpoint)
    own = find_own_tokenizer(arguments.checkpoint)
    base = load_model(arguments.base, arguments.dtype, saved.modules)
    _check_tokens(own, arguments, base)
    handle = patch_saved(base, saved)
    if arguments.max_kl is not None:
        handle.model.to(device_to_use(arguments.device))
        tokenizer = tokenizer_of_pair(arguments.base, arguments.checkpoint, None)
        share, left = limit_drift(
            handle, arguments.max_kl, arguments.texts, tokenizer=tokenizer, **sizes
        )
        if not share:
            raise ValueError(
                f"no share of the update that was tried keeps the KL below {arguments.max_kl:g}: "
                "nothing is written. Allow more, or train at a lower rate."
            )
        print(
            f"{share:.3g} of the update is kept, KL {left.overall.kl:.3g} from the base"
            + (f"; {left.left_out} texts were left out (--tokens)" if left.left_out else "")
        )
    model: Any = handle.merge()
    model.save_pretrained(out)
    _copy_processor(arguments.base, out)
    if own is not None:  # with the chat template that was trained with
        own.save_pretrained(out)
    print(f"merged model -> {out}")


def _check_tokens(tokenizer: Any, arguments: argparse.Namespace, base: Any) -> None:
    """Raise ValueError if the tokenizer beside an update has tokens that its base lacks.

    Gemma 3's own has one more than there are embeddings.
    """
    from .forgetting.models import find_own_tokenizer
    from .sharding import full_shape
    from .structure import embedding_weight

    if tokenizer is None:
        return
    theirs = find_own_tokenizer(arguments.base)
    old = {} if theirs is None else theirs.get_vocab()
    known = full_shape(embedding_weight(base))[0]
    added = [t for t, n in tokenizer.get_vocab().items() if n >= known and t not in old]
    if added:
        raise ValueError(
            f"the tokenizer in {arguments.checkpoint} has {len(added)} tokens ({added[0]}, ...) "
            f"that {arguments.base} has no embeddings of: they were added before training. In "
            "Python: load the base, base.resize_token_embeddings as then, "
            "loki_kernels.load_adapter(base, FOLDER).merge()."
        )


def _copy_processor(base: str, out: Path) -> None:
    """Copy a model's processor, which is its tokenizer where it reads text alone.

    One of images or sounds may need a library that is not installed; then the tokenizer alone.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils.hub import cached_file

    kinds: dict[str, Any] = {"processor": AutoProcessor, "tokenizer": AutoTokenizer}
    for name, kind in kinds.items():
        try:
            kind.from_pretrained(base, trust_remote_code=False).save_pretrained(out)
            break
        except Exception as error:  # of any kind; the model is there by now
            logger.warning("no %s was copied: %s", name, error)
    # transformers writes tokenizer.json alone, and llama.cpp's converter of Gemma wants this one
    with contextlib.suppress(Exception):
        shutil.copy(str(cached_file(base, "tokenizer.model")), out)


def adapter(arguments: argparse.Namespace) -> None:
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


def drift(arguments: argparse.Namespace) -> None:
    from . import forgetting
    from .files import check_writable
    from .plots import import_matplotlib

    for path, suffix in ((arguments.out, ".json"), (arguments.plot, ".png")):
        if path:
            check_writable(path, suffix)
    if arguments.plot:
        import_matplotlib()
    result = forgetting.drift(
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


def inspect(arguments: argparse.Namespace) -> None:
    from .inspection import inspect_model

    print(inspect_model(arguments.model))


def estimate(arguments: argparse.Namespace) -> None:
    from . import estimate as estimating

    print(
        estimating.estimate(
            arguments.model,
            _questions_of(arguments),
            gpus=arguments.gpus,
            definition=arguments.definition,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=arguments.dtype,
        )
    )


def plot(arguments: argparse.Namespace) -> None:
    from .report import plot_files

    plot_files(arguments.files, arguments.out, arguments.quota)
    print(f"{', '.join(arguments.files)} -> {arguments.out}")


def env(_arguments: argparse.Namespace) -> None:
    from .environment import environment
    from .ops._dispatch import backends

    for name, value in environment().items():
        print(f"{name:16} {value}")
    print(backends())


def doctor(_arguments: argparse.Namespace) -> None:
    from .doctor import examine

    failed = []
    for check in examine():
        print(check, flush=True)
        if check.status == "FAIL":
            failed.append(check.name)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}.")
