"""That the processes of a group train the same thing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import explained
from ..fingerprint import tensors_fingerprint


def check_processes_agree(
    rows: Iterable[Tensor], protection: str | None, base: Iterable[Tensor] = ()
) -> None:
    """Raise ValueError if another process trains other rows, of another base, or protects others.

    Each checks the same models in turn, by the group's key-value store and not by a collective, in
    which a process that trains alone would wait for the others.

    Args:
        rows: of every layer.
        protection: its fingerprint.
        base: the rows that the update is added to. DDP hands on the first process's weights and not
            these.
    """
    digest = hashlib.sha256(repr([layer.tolist() for layer in rows]).encode()).hexdigest()
    own = (digest, str(protection), tensors_fingerprint(layer[..., :_INPUTS] for layer in base))
    store = torch.distributed.distributed_c10d._get_default_store()
    said = store.compare_set(f"loki_kernels/trained/{next(_checks)}", "", " ".join(own))
    same_rows, same_protection, same_base = map(str.__eq__, own, said.decode().split(" "))
    if not same_rows:
        message = (
            "this process trains other rows than another one, so their gradients are of different "
            "weights. Give every process the same row file (rows=...), or patch after "
            "torch.distributed is initialised, where one selection reaches all."
        )
        raise explained(ValueError(message))
    if not same_protection:
        raise ValueError(
            "this process protects other directions than another one, so one update makes two "
            "models. Give every process the same file (protect=...), or patch after "
            "torch.distributed is initialised, where one estimate reaches all."
        )
    if not same_base:
        raise ValueError(
            "this process holds other base weights than another one, to which the update of its "
            "rows is added, so one update makes two models. Load the same checkpoint in every "
            "process before patching; DDP hands on the first one's weights and not these rows."
        )


_checks = itertools.count()

# By which two bases are told apart, in every row: a core reads .08 billion numbers a second, so
# that whole rows of a model that lies on the CPU would take 24 s at 8B, and these take 2.
_INPUTS = 1024
