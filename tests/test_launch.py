"""lmops.ops._launch: launches that are prepared once."""

from types import SimpleNamespace

import pytest
import torch

import lmops
from lmops.ops import _launch
from lmops.ops._launch import Launch, prepared


@pytest.fixture
def no_driver(monkeypatch):
    """What needs no kernel runs without a GPU."""
    monkeypatch.setattr(_launch, "_triton", lambda: (SimpleNamespace(interpret=True), None))


def test_alike_calls_are_prepared_once(no_driver):
    calls = []

    @prepared
    def prepare(x, option):
        calls.append((x, option))
        return len(calls)

    x = torch.zeros(4, 6)
    assert prepare(x, True) == prepare(torch.ones(4, 6), True) == 1
    others = [
        (x, False),
        (None, True),
        (x.half(), True),
        (torch.zeros(6, 4), True),
        (torch.zeros(6, 4).t(), True),
        (torch.zeros(25)[1:].view(4, 6), True),
    ]
    assert [prepare(*one) for one in others] == [2, 3, 4, 5, 6, 7]
    assert [prepare(*one) for one in others] == [2, 3, 4, 5, 6, 7]


def test_what_is_remembered_is_bounded(monkeypatch, no_driver):
    monkeypatch.setattr(_launch, "MOST", 3)
    calls = []
    prepare = prepared(lambda n: calls.append(n))
    for n in (1, 2, 3, 1, 2, 3, 4, 4, 1):
        prepare(n)
    # a result of None is not remembered
    assert calls == [1, 2, 3, 1, 2, 3, 4, 4, 1]
    numbers = prepared(lambda n: calls.append(n) or n)
    calls.clear()
    for n in (1, 2, 3, 1, 2, 3, 4, 4, 1):
        assert numbers(n) == n
    assert calls == [1, 2, 3, 4, 1]


class Kernel:
    """Stands for a JITFunction: what it compiles is itself a thing to launch."""

    arg_names = ("x", "y", "n", "scale", "BLOCK", "FLAG")

    def __init__(self, compiled):
        self.compiled, self.first, self.later = compiled, [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.first.append((grid, args, options))
            if not self.compiled:
                return None
            return {grid: lambda *args: self.later.append((grid, args))}

        return launch


@pytest.mark.parametrize("compiled", [True, False])
def test_a_launch_takes_its_leading_arguments_anew(compiled):
    kernel = Kernel(compiled)
    launch = Launch(kernel, (5, 2), 7, 0.5, FLAG=True, BLOCK=16, num_warps=4)
    for x in "abc":
        launch(x, None)
    options = {"FLAG": True, "BLOCK": 16, "num_warps": 4}
    first = [((5, 2, 1), (x, None, 7, 0.5), options) for x in "abc"]
    assert kernel.first == (first[:1] if compiled else first)
    # all in the kernel's order, and without what only the compiler wants
    assert kernel.later == ([((5, 2, 1), (x, None, 7, 0.5, 16, True)) for x in "bc"] if compiled else [])


def test_calls_alike_give_results_of_their_own(path):
    xs = [torch.randn(3, 40, device=path.device) for _ in range(3)]
    for t, x in zip((1.0, 0.5, 2.0), xs, strict=True):
        torch.testing.assert_close(lmops.softmax(x, t), torch.softmax(x / t, -1))
        torch.testing.assert_close(lmops.rms_norm(x), torch.rms_norm(x, (40,), eps=1e-6))
