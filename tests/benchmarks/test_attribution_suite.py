"""What the attribution suite checks before it times."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attribution, shapes

DEFINITIONS = ["published", "captum"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def checked(request, monkeypatch):
    """A function that checks a tiny model's scores in a dtype."""
    for module in (attribution, shapes):
        monkeypatch.setattr(module, "DTYPE", request.param)
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    model = shapes.build("tiny").requires_grad_(False)
    ids = torch.arange(16) * 7 % 256
    return lambda: attribution.check_scores(model, ids, 4, DEFINITIONS, [0, 1, 2])


def test_wrong_scores_are_not_timed(checked, monkeypatch):
    right = attribution.attribute

    def wrong(*args, **options):
        result = right(*args, **options)
        result.scores[:, 1] *= 1.1
        return result

    monkeypatch.setattr(attribution, "attribute", wrong)
    with pytest.raises(SystemExit, match="is off by"):
        checked()


def test_a_wrong_captum_alone_is_not_timed(checked, monkeypatch, capsys):
    pytest.importorskip("captum")
    assert checked()
    right = attribution._captum
    monkeypatch.setattr(attribution, "_captum", lambda *given: right(*given) * 1.5)
    assert not checked()
    assert "not timed: the captum package on layer" in capsys.readouterr().out


def test_a_missing_captum_is_said(checked, monkeypatch, capsys):
    monkeypatch.setattr(attribution, "find_spec", lambda name: None)
    assert not checked()
    assert "captum is not installed" in capsys.readouterr().out


def test_both_attribute_one_token(checked, monkeypatch):
    seen = []

    def note(name):
        right = getattr(attribution, name)

        def called(*args, **options):
            seen.append(options["target"])
            return right(*args, **options)

        monkeypatch.setattr(attribution, name, called)

    note("attribute")
    note("attribute_reference")
    checked()
    assert {t[0] if isinstance(t, list) else t for t in seen} == {seen[0][0]}
