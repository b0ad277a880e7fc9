"""How operators are made: lmops/ops/_register.py."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import lmops
from lmops.ops import _register


def test_a_launcher_runs_with_its_tensors_gpu_as_the_current_one(monkeypatch):
    """Without a second GPU to try it on: what is entered around the launch."""
    current = []

    @contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    launcher = _register._on_its_device(lambda first, *rest: seen.append((list(current), rest)) or "result")
    assert launcher(SimpleNamespace(device="cuda:1"), 2, 3) == "result"
    assert seen == [(["cuda:1"], (2, 3))]
    assert current == []


@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_operator_has_its_kernels(key):
    assert _register.OPERATORS
    for name in _register.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lmops::{name}", key)


def test_every_operator_says_what_it_uses_and_why():
    for operator in _register.OPERATORS.values():
        assert operator.implementation("cuda") == ("triton", "tensors on a GPU")
        assert operator.implementation("cpu") == ("torch", "tensors on the CPU")


def test_the_schema_never_promises_aliases():
    """Operators return new tensors: torch.compile may reorder and drop them. What some write to, they declare."""
    x = torch.randn(2, 3)
    assert lmops.softmax(x).data_ptr() != x.data_ptr()
    writing = set()
    for name in _register.OPERATORS:
        schema = getattr(torch.ops.lmops, name).default._schema
        assert all(value.alias_info is None for value in schema.returns)
        if schema.is_mutable:
            writing.add(name)
    losses = ("cross_entropy_forward", "cross_entropy_backward", "kl_div_forward", "kl_div_backward")
    # a gradient may take the place of the logits; pages and what is rotated in place are written to by intention
    assert writing == {*losses, "scale_unless_one", "rope_", "store_kv", "copy_blocks"}


X, TARGETS_OF_X = torch.randn(4, 16), torch.arange(4)
INT8 = lmops.quantization.round_to_nearest(torch.ones(8, 16), bits=8, group_size=-1)
FORWARD_MODE = {
    "softmax": lmops.softmax,
    "scaled_dot_product_attention": lambda x: lmops.scaled_dot_product_attention(*[x[None, None]] * 3),
    "cross_entropy": lambda x: lmops.cross_entropy(x, TARGETS_OF_X),
    "kl_div": lambda x: lmops.kl_div(x, X),
    "linear_cross_entropy": lambda x: lmops.linear_cross_entropy(x, torch.ones(20, 16), TARGETS_OF_X),
    "rms_norm": lambda x: lmops.rms_norm(x, torch.ones(16)),
    "layer_norm": lambda x: lmops.layer_norm(x, torch.ones(16)),
    "swiglu": lmops.swiglu,
    "rope": lambda x: lmops.rope(x[None, None], None, torch.ones(8), torch.ones(8)),
    "quantized_matmul": lambda x: lmops.quantized_matmul(x, INT8),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(name):
    """Tangents are not dropped without a word."""
    with forward_ad.dual_level():
        FORWARD_MODE[name](X)  # nothing is differentiated
        with pytest.raises(NotImplementedError, match="jvp"):
            FORWARD_MODE[name](forward_ad.make_dual(X, torch.randn_like(X)))
