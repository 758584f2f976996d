"""`LokiConfig`, and what makes PEFT know it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import hf_hub_download
from packaging.version import Version
from peft import PeftConfig, PeftType, TaskType

from ..errors import check_choice
from ..fingerprint import BaseRows
from ..options import Criterion
from ..protection import Protection
from ..training.adapter_file import PROTECTION_FILE, write_protection
from ..training.targets import as_selection, check_arguments

logger = logging.getLogger(__name__)

MERGES = ("dequantize", "requantize")
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_OLDEST = "0.18"  # which LLaMA-Factory 0.9.5 pins
if Version(peft.__version__) < Version(_OLDEST):
    raise ImportError(
        f"loki_kernels.peft needs peft {_OLDEST} or newer; {peft.__version__} is installed."
    )


def _add_peft_type() -> None:
    """Extend PEFT's enum of methods by ``LOKI``, for everything in this process.

    ``register_peft_method`` takes no name that the enum lacks, and PEFT offers no way to add one
    (0.18 to 0.21). So whoever imports ``loki_kernels.peft`` gets it, and ``import loki_kernels``
    alone changes nothing. It is a string as the other members are, and is not undone: configs and
    models of this type may be in use anywhere.
    """
    if "LOKI" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "LOKI")
    member._name_ = member._value_ = "LOKI"
    PeftType._member_names_.append("LOKI")
    PeftType._member_map_["LOKI"] = member
    PeftType._value2member_map_["LOKI"] = member
    type.__setattr__(PeftType, "LOKI", member)


_add_peft_type()


@dataclass
class LokiConfig(PeftConfig):
    """Train rows of every FFN down-projection: all, protected, as `loki_kernels.patch` does.

    Args:
        rows: path of a row file, which is read at once and not needed again, or one list of rows a
            layer.
        quota: percentage of rows that an analysis of the model on the bundled questions chooses;
            100 are all rows, without one.
        criterion: what it goes by: ``"magnitude"``, or ``"signed"`` as in the paper.
        rank: train an update of rank r (LoKI*).
        protect: path of a `Protection`'s file, True, which estimates one, or False; None is True
            where nothing above says what to train. What is saved holds the update as it
            acts, and the protection in a file beside it, which training on takes and nothing else.
        quantized_merge: how to merge into a quantized base: ``"dequantize"`` makes the merged
            model an ordinary one, ``"requantize"`` rounds the merged weights as the base's were.
        modules_to_save: names of modules to train whole beside the rows, as for ``LoraConfig``; a
            new classification head by itself, with ``task_type="SEQ_CLS"`` and its like.
        trainable_token_indices: tokens whose embeddings are trained, as for ``LoraConfig``.
        fingerprint: of the rows that the update is added to. This, ``base_dtype`` and
            ``base_sketch`` (of `BaseRows`) are filled in by themselves, and checked when the
            adapter is loaded onto a model, which may be of another dtype, quantized or not.
        protection: fingerprint of the protection, filled in likewise.

    Raises:
        ValueError: for a damaged row file, rows that are negative, duplicated or of FFN neurons,
            a quota or criterion beside them, a quota outside (0, 100], a rank below 1, an unknown
            ``criterion`` or ``quantized_merge``, or ``modules_to_save`` that are no list.
        TypeError: for a `Protection` itself, which has no place in a config.
    """

    rows: str | list[list[int]] | None = None
    quota: float | None = None
    criterion: Criterion | None = None
    rank: int | None = None
    protect: str | bool | None = None
    quantized_merge: str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fingerprint: str | None = None
    base_dtype: str | None = None
    base_sketch: list[list[float]] | None = field(default=None, repr=False)
    protection: str | None = None
    target_modules: set[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # a file says its type, which a call does not, and could have any other file read here
        from_file = self.peft_type is not None
        if isinstance(self.rows, str) and from_file:
            raise ValueError(
                "the adapter's config names a file in rows; one that is read from a file has to "
                "hold the rows themselves, a list for each layer."
            )
        self.peft_type = PeftType("LOKI")
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        saved = self.fingerprint is not None  # it has rows and what they were chosen by
        check_arguments(
            None if saved else self.rows,
            self.quota,
            self.criterion,
            None,
            self.rank,
            self.modules_to_save or (),
        )
        if isinstance(self.protect, Protection):
            raise TypeError(
                "a config is a file and names another one: protection.save(FILE), protect=FILE."
            )
        if self.protect is not None and not isinstance(self.protect, bool):
            # what a model has filled in names a file of the machine that trained it, and the one
            # that lies beside it is known to `from_pretrained`
            self.protect = None if from_file and saved else os.fspath(self.protect)
        if self.quota is not None:
            self.quota = float(self.quota)  # NumPy's have no place in a file
        if self.quantized_merge is not None:
            check_choice("quantized_merge", self.quantized_merge, MERGES)
        if self.rows is not None:
            self.rows = [layer.tolist() for layer in as_selection(self.rows)]
        self.kept: Protection | None = None  # what ``protection`` is the fingerprint of
        self.present: BaseRows | None = None  # the rows of the model that it was made for
        self.hub: Callable[[], str] | None = None  # fetches its file
        self.unfetched = ""  # why that failed

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, and the protection beside it, once a model has filled the config in."""
        super().save_pretrained(save_directory, **kwargs)
        if self.fingerprint is not None:
            write_protection(save_directory, self.kept, self.protection, self.protect)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LokiConfig:
        """PEFT's, with the protection that lies in the folder, wherever it lay before.

        Of a hub's repository it is fetched where the adapter is to be trained on.
        """
        config: LokiConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder, **kwargs
        )
        beside = Path(pretrained_model_name_or_path, subfolder or "", PROTECTION_FILE)
        if config.protection is not None and beside.is_file():
            config.protect = str(beside)
        elif not Path(pretrained_model_name_or_path).is_dir():
            # a name in a config of the hub's is of none of this machine's files
            config.protect = config.protect if isinstance(config.protect, bool) else None
            if config.protection is not None:
                config.hub = functools.partial(
                    hf_hub_download,
                    pretrained_model_name_or_path,
                    PROTECTION_FILE,
                    subfolder=subfolder,
                    **{name: kwargs[name] for name in _OF_THE_HUB if name in kwargs},
                )
        return config

    def fetch(self) -> None:
        """Take the protection that lies beside an adapter on the hub, if that is to be trained."""
        if self.hub is None or self.inference_mode:
            return
        try:
            self.protect = self.hub()
        except Exception as error:  # it lacks one, or there is no connection: of many kinds
            self.unfetched = f" (nothing was fetched: {error})"
        self.hub = None
