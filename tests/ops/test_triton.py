"""What tuned kernels leave behind where a launch fails, and that one thread launches at a time."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")


def test_a_launch_that_fails_leaves_no_arguments_behind(monkeypatch):
    """As Triton's tuner does that runs out of memory, which a smaller batch then lacks."""
    from loki_kernels.ops._triton import _Locked

    class Tuner:
        nargs = None

        def __getitem__(self, grid):
            def launch(*arguments):
                self.nargs = dict(enumerate(arguments))
                raise torch.OutOfMemoryError

            return launch

    tuner, x = Tuner(), torch.zeros(3)
    kept = weakref.ref(x)
    kernel = _Locked(lambda: tuner)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(torch.OutOfMemoryError):
        kernel[0](x)
    assert tuner.nargs is None
    del x
    gc.collect()
    assert kept() is None


def test_a_tuned_kernel_is_launched_by_one_thread_at_a_time(monkeypatch):
    from loki_kernels.ops._triton import _Locked

    busy, launched = threading.Lock(), []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                assert busy.acquire(blocking=False)
                time.sleep(0.01)
                launched.append((grid, arguments, constants))
                busy.release()

            return launch

    made = []
    kernel = _Locked(lambda: made.append(1) or Kernel())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: kernel[i](i, BLOCK=16), range(8)))
    assert sorted(launched) == [(i, (i,), {"BLOCK": 16}) for i in range(8)]
    assert len(made) == 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)  # of another kind, perhaps
    kernel[0](0)
    assert len(made) == 2
