"""What `import lmops` brings, and what it works without."""

import json
import os
import subprocess
import sys

import pytest

ENV = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LMOPS_TRITON_ON_CPU")}


def fresh(code, **env):
    """Runs code in a new interpreter; returns what it prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**ENV, **env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_brings_no_heavy_package():
    heavy = ("triton", "transformers", "safetensors", "tokenizers", "gguf", "huggingface_hub", "typer", "matplotlib")
    code = (
        "import sys, torch, json; before = set(sys.modules); import lmops, lmops.models, lmops.engine, lmops.modules;"
        f"print(json.dumps([m for m in {heavy} if m in set(sys.modules) - before]))"
    )
    assert fresh(code) == []


def test_the_parts_that_users_name_are_there():
    code = "import json, lmops; print(json.dumps([lmops.modules.__name__, lmops.flash_attn.__name__]))"
    assert fresh(code) == ["lmops.modules", "lmops.flash_attn"]


WITHOUT_TRITON = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
"""


def test_everything_but_kernels_works_without_triton():
    code = (
        WITHOUT_TRITON
        + """
import torch, lmops, lmops.testing
from lmops.models import GPT, GPTConfig
from lmops.engine import generate
x = torch.randn(3, 5, requires_grad=True)
lmops.softmax(x, 0.5).sum().backward()
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=17, context_length=16, n_layers=1, n_heads=2, d_model=8))
tokens = generate(model, [[1, 2, 3]], max_new_tokens=4, temperature=0.7, seed=1)
assert "triton" not in sys.modules
try:
    with lmops.testing.implementation("triton"):
        lmops.softmax(x)
except ModuleNotFoundError as e:
    error = str(e)
print(json.dumps([list(x.grad.shape), len(tokens[0]), error]))
"""
    )
    shape, n_tokens, error = fresh(code)
    assert shape == [3, 5]
    assert n_tokens == 4
    assert "triton" in error


DISPATCH = """
import json, lmops, torch
from lmops.ops._register import OPERATORS
kind, why = OPERATORS["softmax_forward"].implementation("cpu")
y = lmops.softmax(torch.tensor([[0.0, 1.0]]))
print(json.dumps([kind, why, "lmops.kernels.softmax" in __import__("sys").modules, y.tolist()]))
"""


@pytest.mark.parametrize(("env", "expected"), [({}, "torch"), ({"TRITON_INTERPRET": "1"}, "triton")])
def test_implementation_for_cpu_tensors(env, expected):
    kind, why, kernel_imported, y = fresh(DISPATCH, **env)
    assert kind == expected
    assert ("TRITON_INTERPRET" in why) == (expected == "triton")
    assert kernel_imported == (expected == "triton")
    assert y[0] == pytest.approx([0.26894, 0.73106], abs=1e-5)


def test_a_triton_driver_for_cpu_tensors_gets_the_launcher():
    code = """
import json, lmops
from lmops.ops._register import OPERATORS
print(json.dumps([op.implementation("cpu")[0] for op in OPERATORS.values()]))
"""
    assert set(fresh(code, LMOPS_TRITON_ON_CPU="1")) == {"triton"}
    assert set(fresh(code)) == {"torch"}
