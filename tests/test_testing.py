"""The tools that tests rely on: the accuracy rule, the layouts, the named implementation, the repaired interpreter."""

import pytest
import torch

import lmops
from lmops.testing import LAYOUTS, arrange, assert_accurate, implementation


def test_accuracy_rule_passes_rounding_and_refuses_twice_as_much():
    truth = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    rounded = truth.bfloat16()
    assert_accurate(rounded, truth, rounded)
    # bfloat16's eps times the largest value; torch's own error is a third of it, so the rule allows 8/3
    step = 2**-7 * 3
    assert_accurate((truth + step).bfloat16(), truth, rounded)
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate((truth + 4 * step).bfloat16(), truth, rounded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_accuracy_rule_sees_special_values(value):
    truth = torch.tensor([1.0, value], dtype=torch.float64)
    good = truth.float()
    assert_accurate(good, truth, good)
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_accurate(torch.tensor([1.0, 2.0]), truth, good)
    with pytest.raises(AssertionError, match="should be finite"):
        assert_accurate(torch.tensor([value, value]), truth, good)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(good.half(), truth, good)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(good[:1], truth, good)


def test_layouts_differ_in_memory_only():
    x = torch.randn(4, 6, 8)
    strides = {}
    for layout in LAYOUTS:
        y = arrange(x, layout)
        strides[layout] = (y.stride(), y.storage_offset())
        assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)
    assert len(set(strides.values())) == len(LAYOUTS)
    with pytest.raises(ValueError, match="layout must be one of"):
        arrange(x, "diagonal")


def test_implementation_is_named_counted_and_undone():
    x = torch.randn(2, 3)
    with implementation("torch") as outer:
        lmops.softmax(x)
        with implementation("torch") as inner:
            lmops.softmax(x)
            lmops.softmax(x)
        lmops.softmax(x)
    lmops.softmax(x)
    assert (outer.count, inner.count) == (2, 2)


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.empty_like(torch.ones(3, 3)).isnan().all()
    assert torch.ones(3).new_empty(5, dtype=torch.bfloat16).isnan().all()


def test_interpreter_rounds_bfloat16_as_torch_does(path):
    """Values half way between two bfloat16 numbers, through a kernel's store."""
    if path.kind == "torch":
        lmops.softmax(torch.zeros(1, 2))
        return
    x = torch.randn(16, 64) * 3
    exact = lmops.softmax(x.to(path.device))
    assert torch.equal(lmops.softmax(x.to(path.device), dtype=torch.bfloat16), exact.bfloat16())
