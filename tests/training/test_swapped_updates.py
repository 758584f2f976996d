"""Other update values in a patched model for a while: a teacher's, an average's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

import loki_kernels as loki
from tests.models import build_model
from tests.tiny_training import ROWS, token_batch, train

CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
}


def trained(name="llama", checkpointing="none", **options):
    """A model that was trained a little, and its trained parameters by name."""
    model = build_model(name)
    loki.patch(model, ROWS, **options)
    train(model.train())
    model.zero_grad()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        model.enable_input_require_grads()
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    batch = token_batch(2)
    return model(input_ids=batch, labels=batch).loss


def called_with(model, parameters):
    """What a mean teacher answers: the model with other values of the trained parameters."""
    with torch.no_grad():
        return functional_call(model, parameters, (), {"input_ids": token_batch(2)}).logits


def gradients(loss, parameters):
    """Of a loss, by name; the model has none afterwards."""
    loss.backward()
    found = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_teachers_pass_before_the_backward_pass_is_refused(fused):
    model, parameters = trained(fuse_mlp=fused)
    teacher = {name: 2.0 * p.detach() for name, p in parameters.items()}
    want = gradients(loss_of(model), parameters)
    loss = loss_of(model)
    called_with(model, teacher)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.zero_grad()
    called_with(model, teacher)  # the teacher first, as it should be
    assert_same(gradients(loss_of(model), parameters), want)


def test_values_that_are_swapped_and_back_are_refused():
    """As an average of weights does it, by ``.data``, which no version tells of."""
    model, parameters = trained()
    loss = loss_of(model)
    own = {name: p.data for name, p in parameters.items()}
    for factor in (2.0, 1.0):
        for name, parameter in parameters.items():
            parameter.data = own[name] if factor == 1.0 else factor * own[name]
        with torch.no_grad():
            loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("checkpointing", "another"),
    [
        *((name, False) for name in CHECKPOINTING),
        # whose layers run again, and write their own update after a teacher's pass wrote another
        *((name, True) for name in CHECKPOINTING if name != "none"),
    ],
)
def test_a_pass_of_the_same_values_or_before_layers_run_again(checkpointing, another):
    model, parameters = trained(checkpointing=checkpointing)
    want = gradients(loss_of(model), parameters)
    loss = loss_of(model)
    own = {name: p.detach() for name, p in parameters.items()}
    called_with(model, {name: 2.0 * p for name, p in own.items()} if another else own)
    assert_same(gradients(loss, parameters), want)


def test_a_pass_that_a_trainer_keeps_rows_for_writes_anothers():
    """A teacher's update may have been changed as often as the student's."""
    model = build_model()
    handle = loki.patch(model, ROWS)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    want = called_with(model, parameters)
    teacher = {n: torch.full_like(p, 0.1) for n, p in parameters.items()}
    for name, parameter in parameters.items():
        assert teacher[name]._version == parameter._version
    handle._writer.keep_rows()
    assert not torch.equal(called_with(model, teacher), want)


def test_a_copy_trains_by_itself():
    model, parameters = trained()
    loss = loss_of(model)
    loss_of(copy.deepcopy(model)).backward()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters.values())
