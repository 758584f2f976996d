"""What happens in a patched model when its decoder starts and ends a forward pass."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import explained
from ..protection import fingerprint_of
from ..sharding import DTensor, full_shape, is_distributed, shards_its_weights
from ..structure import embedding_weight, foreign_forward
from .adapter_file import protection_of, why_other_protection
from .agreement import check_processes_agree
from .arithmetic import check_gradients, coarse_dtype, place_of, version_of
from .experts import LokiExperts
from .linear import LokiLinear
from .loading import check_there
from .rows import TRAINED, LokiRows, write_rows

logger = logging.getLogger(__name__)


@dataclass
class RowWriter:
    """Writes the rows of all layers into their weights when the decoder starts.

    In one launch, protected ones in one each, since forming those takes another tensor a layer.

    Where an engine shards the weights it tells the layers so, and writes nothing. Before a training
    step it raises if nothing would be trained, or in a process other rows than in the others.
    """

    model: PreTrainedModel
    named_layers: Mapping[str, LokiRows]
    agreed: bool  # whether the processes train the same rows of one base in the same directions
    checked: bool = field(default=False, init=False)  # that the model can be trained
    warned: bool = field(default=False, init=False)  # that small steps are lost
    holders: int = field(default=0, init=False)  # who want the rows to stay as they were written
    bases: list[LokiRows] = field(default_factory=list, init=False)  # that had the base before
    # Where the updates lie that were last written, and their versions.
    versions: list[tuple[int, int | None]] | None = field(default=None, init=False)
    followed: bool = field(default=False, init=False)  # that what holds a layer calls it
    hooks: list[RemovableHandle] = field(default_factory=list, init=False)  # that follow it
    kept: bool = field(default=False, init=False)  # whether a trainer says that they are as then
    in_training: bool = field(default=False, init=False)  # whether training steps write the rows
    tokens: int = field(init=False)  # that the model had embeddings of when it was patched
    # The layers, and what is around experts, which may read their weights without calling them.
    forwards: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = full_shape(embedding_weight(self.model))[0]
        experts = (name for name, x in self.named_layers.items() if isinstance(x, LokiExperts))
        around = (name.rpartition(".")[0] for name in experts)
        self.forwards = {
            **self.named_layers,
            **{name: self.model.get_submodule(name) for name in around},
        }

    @property
    def held(self) -> bool:
        """Whether the rows stay as they were written."""
        return self.holders > 0

    @property
    def layers(self) -> Collection[LokiRows]:
        return self.named_layers.values()

    def attach(self, decoder: nn.Module) -> list[RemovableHandle]:
        return [
            self.model.register_load_state_dict_pre_hook(self.before_loading),
            decoder.register_forward_pre_hook(self.before_forward),
            decoder.register_forward_hook(self.after_forward, always_call=True),
            *self.watch(),
        ]

    def before_forward(self, decoder: nn.Module, _inputs: Any) -> None:
        self._check_forwards()
        if torch.compiler.is_compiling():  # there the weight is not written
            return
        if getattr(decoder, "_is_replica", False):
            raise explained(
                RuntimeError(
                    "nn.DataParallel, which HF Trainer uses in one process that sees several GPUs, "
                    "cannot run a patched model; start a process a GPU (torchrun), or show one "
                    "alone (CUDA_VISIBLE_DEVICES=0)."
                )
            )
        graded = torch.is_grad_enabled()
        if graded:
            self.watch()
            if decoder.training:
                self._check_training()
                self._follow_calls()
                self.in_training = True
        if self.held:
            return
        sharded = shards_its_weights(self.model)
        if graded and sharded:  # whose gradients come to no hook
            for layer in self.layers:
                self._check_gradient(layer)
        written = [layer for layer in self.layers if layer.can_write and not sharded]
        kept, self.kept = self.kept, False  # for one forward pass
        versions = self._versions()
        unknown = any(version is None for _, version in versions)
        as_written = self.versions == versions and all(layer.written for layer in written)
        if not kept or unknown or not as_written:
            write_rows(written)
            self.versions = versions
        for layer in map(check_there, self.layers):
            layer.sharded = sharded
            # A state dict was made of it, or it ran before an engine sharded it; what is added to
            # is the base. What FSDP2 has gathered by now, in the root's own group, is not kept.
            added_to = isinstance(layer.frozen, DTensor) if sharded else not layer.can_write
            if layer.written and added_to:
                layer.write_base()
        for layer in written:
            layer.in_step = True

    def keep_rows(self) -> None:
        """The next forward pass need not write the rows: a trainer knows that nothing was trained.

        By itself an update's version does not tell, since some optimizers write past it; a trainer
        that accumulates gradients, or evaluates, does. Of all protected rows at 8B that spares 7.7
        TFLOP and .05 TB a pass.
        """
        self.kept = True

    def forget_rows(self) -> None:
        """The next forward pass writes the rows, whoever else says that they are as they were."""
        self.kept, self.versions = False, None

    def take_back_rows(self) -> None:
        """Put the base back before a step of a compiled model, which writes no rows.

        Evaluation runs the model as it was before and writes them, and so does resuming: steps
        would be compiled anew and keep their update for the backward pass. Not where the decoder's
        layers are compiled one by one, and the decoder itself writes at every step.
        """
        for layer in () if self.in_training else self.layers:
            layer.take_back()

    def _versions(self) -> list[tuple[int, int | None]]:
        trained = (p for layer in self.layers for _, p in layer.trained_parameters())
        return [(place_of(p), version_of(p)) for p in trained]

    def _follow_calls(self) -> None:
        """Have RuntimeError raised in the first training pass where a layer's weight is read alone.

        flash-linear-attention's fused MLPs do that, and BLOOM's with ``pretraining_tp``: the update
        would get no gradient. What a pass does not reach, as an expert of a list, is in a module
        that does not run. Compiled code, in which no flag is set, calls what it calls unseen.
        """
        if self.followed:
            return
        self.followed = True
        names = {layer: name for name, layer in self.named_layers.items()}

        def check(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if torch.compiler.is_compiling() or _has_compiled():
                return
            for layer in module.children():
                if isinstance(layer, LokiLinear) and not layer.called:
                    raise RuntimeError(
                        f"the weight of {names[layer]} is read, and it is not called, by its "
                        f"{type(module).__name__}: the update of its rows would get no gradient. "
                        "Switch off what reads it (fuse_swiglu of flash-linear-attention, BLOOM's "
                        "slow_but_exact) in the model's config."
                    )

        for module in self.model.modules():
            held = [layer for layer in module.children() if isinstance(layer, LokiLinear)]
            for layer in held:
                layer.called = False
            if held:
                self.hooks.append(module.register_forward_hook(check))

    def after_forward(self, _decoder: nn.Module, _inputs: Any, _output: Any) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        if not torch.compiler.is_compiling() and not self.held:
            for layer in self.layers:
                layer.in_step = False

    def watch(self) -> list[RemovableHandle]:
        """Have gradients of the updates refused where they may not be trained on, in any mode.

        `from_pretrained` gives models in evaluation mode, in which a loop may train; and what asks
        for no gradient may evaluate.
        """
        handles = []
        for layer in self.layers:
            trained = (p for _, p in layer.trained_parameters())
            handles += check_gradients(trained, partial(self._check_gradient, layer))
        return handles

    def _check_gradient(self, layer: LokiRows) -> None:
        self._check_allowed([layer])
        layer.check_loaded(to_train=True)
        if not self.checked:  # in evaluation mode no forward pass has
            self._check_model()

    def before_loading(
        self, _model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        """Note which rows a state dict of their decoder layers has nothing of.

        HF Trainer loads a checkpoint's names as they are in the files, some families' experts one
        by one, and takes no notice of what does not fit; of one in shards it loads each, in any
        order. Another stack of the model, such as a vision tower's, numbers layers of its own.
        """
        own_names = (*self.model.named_parameters(), *self.model.named_buffers())
        known = {f"{prefix}{name}" for name, _ in own_names}
        strange = [key for key in state_dict if key not in known]
        for name, layer in self.named_layers.items():
            own = {f"{prefix}{name}.{part}" for part in (layer.parameter, *TRAINED)}
            if not own.isdisjoint(state_dict):
                layer.passed_over = False
                continue
            around = re.search(r"[^.]+\.\d+\.", name)  # the decoder layer, as in "layers.3."
            of_layers = around is not None and (
                any(around[0] in key for key in strange)
                or any(key.startswith(f"{prefix}{name[: around.end()]}") for key in state_dict)
            )
            names = _names_in_files(self.model, f"{name}.{layer.parameter}", layer.frozen)
            in_files = [state_dict.get(f"{prefix}{each}") for each in names]
            if of_layers or any(weight is not None for weight in in_files):
                layer.pass_over(in_files)

    def _check_allowed(self, layers: Iterable[LokiRows]) -> None:
        if self.held:
            raise RuntimeError(
                "the model trains inside handle.inference(), where the rows are not written anew; "
                "leave it first."
            )
        for layer in layers:
            if layer.trained_with is not None and layer.protection is None:
                refusal = why_other_protection(layer.trained_with[0], None)
                raise RuntimeError(f"the update that was loaded cannot be trained on: {refusal}.")

    def _check_forwards(self) -> None:
        """Raise RuntimeError if another program's forward pass runs in place of a module's own."""
        for name, module in self.forwards.items():
            by = foreign_forward(module)
            if by is None:
                continue
            raise RuntimeError(
                f"something has replaced the forward pass of {name} by {by} after "
                "loki_kernels.patch: the update of its rows may neither act nor be trained (a "
                "wrapper of your own has to be a plain function, or a hook). Liger "
                "(use_liger_kernel) does that to experts; leave them as they are by "
                'TrainingArguments(liger_kernel_config={"swiglu": False}). The library kernels '
                "(use_kernels=True) does it around those of gpt-oss; leave it out."
            )

    def _check_training(self) -> None:
        self._check_allowed(self.layers)
        if not any(p.requires_grad for x in self.layers for _, p in x.trained_parameters()):
            raise explained(
                RuntimeError(
                    "the rows of this patched model are frozen: something (get_peft_model, "
                    "prepare_model_for_kbit_training, requires_grad_(False)) has frozen all "
                    "parameters after loki_kernels.patch. Patch last, and use one method."
                )
            )
        self._check_model()

    def _check_model(self) -> None:
        """What is asked of a model that is trained, in either mode."""
        self._check_tokens()
        for name, layer in self.named_layers.items():
            asked = [part for part in layer.without_gradient if getattr(layer, part).requires_grad]
            if asked:
                raise RuntimeError(
                    f"{name}.{asked[0]} was asked for a gradient (requires_grad_(True)) "
                    f"after loki_kernels.patch; rows of {layer.parameter} are trained, and nothing "
                    "else of these weights. Enable other parameters by name, or handle.unpatch() "
                    "to train them whole."
                )
        if not self.warned:
            self._warn_of_coarse_updates()
        if not self.agreed and is_distributed():
            protection = fingerprint_of(protection_of(self.named_layers))
            check_processes_agree(
                (layer.index for layer in self.layers),
                protection,
                (layer.base_rows for layer in self.layers),
            )
            self.agreed = True
        self.checked = True

    def _check_tokens(self) -> None:
        """Raise RuntimeError if embeddings of tokens were added after patching and stay frozen.

        A resized embedding is trained as the old one was: new ones would stay as they were drawn.
        """
        weight = embedding_weight(self.model)
        count = full_shape(weight)[0]
        if count > self.tokens and not weight.requires_grad:
            raise RuntimeError(
                f"the embeddings of tokens {self.tokens} to {count - 1} were added after "
                "loki_kernels.patch (resize_token_embeddings; TRL's chat_template_path) and are "
                "frozen. Estimate a protection (protect=estimate_protection(model, "
                "tokenizer=tokenizer)), add them (trl.clone_chat_template), then patch(model, "
                "protect=protect, modules_to_save=['embed_tokens', 'lm_head']) with the model's "
                "own names of the two, or without them where they need no training."
            )

    def _warn_of_coarse_updates(self) -> None:
        """Say once that small steps are lost, where something has rounded the update."""
        own = (p for layer in self.layers for _, p in layer.trained_parameters())
        dtype = coarse_dtype(own)
        if dtype is not None and not shards_its_weights(self.model):
            self.warned = True
            logger.warning(
                "something has made the update of rows %s (model.to(dtype), model.half(), "
                "Lightning's bf16-true, bf16_full_eval), in which an optimizer's small steps are "
                "rounded away. Before the optimizer is made: for name, p in "
                "model.named_parameters(): if name.endswith(('update', 'delta_a', 'delta_b')): "
                "p.data = p.data.float()",
                dtype,
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """The rows are written now, and not again at every forward pass."""
        if shards_its_weights(self.model):
            yield
            return
        if not self.holders:
            self.bases = [x for x in self.layers if not (x.can_write and x.written)]
            write_rows(self.layers)
        self.holders += 1  # one may generate inside another, or two threads at once
        try:
            for layer in self.layers:
                layer.in_step = layer.held = True
            yield
        finally:
            self.holders -= 1
            if not self.holders:
                for layer in self.layers:
                    layer.in_step = layer.held = False
                # Under torch.compile the weight holds the base: written, every later step would be
                # compiled anew and keep its update for the backward pass, 7.5 GB at 8B.
                for layer in self.bases:
                    layer.write_base()


def _names_in_files(model: Any, name: str, weight: Tensor) -> list[str]:
    """What ``save_pretrained`` names a weight in its files, or the weight of each expert.

    The list is empty where a family makes a tensor of several weights there.
    """
    stand_in = torch.empty(full_shape(weight), device="meta")
    try:
        names = list(revert_weight_conversion(model, {name: stand_in}))
    except Exception as error:  # of any kind: it is transformers' own way to save
        logger.debug("how files name %s is not known: %s", name, error)
        return []
    return names if len(names) in (1, len(stand_in)) else []


@contextlib.contextmanager
def rows_held(model: nn.Module) -> Iterator[None]:
    """What is trained in rows of a model, of PEFT's too, is formed once for all passes inside."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            hold = getattr(module, HOLD, None)
            if hold is not None:
                stack.enter_context(hold())
        yield


# The name under which a model keeps what its rows are held by.
HOLD = "_loki_hold"


@dataclass(eq=False)
class Generate:
    """An instance's ``generate`` or ``generate_batch``: rows are written once, not at every token.

    Protected rows are formed before they are written: of all rows at every token that would take
    40 times the token itself (SmolLM2-135M, by count). It lies in the model's ``__dict__`` and is
    copied and pickled with it.
    """

    writer: RowWriter  # of a model whose class has a method of that name
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.writer.model
        with self.writer.hold():
            return getattr(type(model), self.name)(model, *args, **kwargs)


def _has_compiled() -> bool:
    """Whether this process has compiled anything."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])
