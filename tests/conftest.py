"""Options and fixtures: where the kernels of a test run, seeds, and memory that is never what it seems.

--device cpu     kernels run in Triton's interpreter (the default where there is no GPU)
--device cuda    kernels run on the GPU (the default where there is one)
--device sm_80   kernels run as compiled code in a simulator, the module `ptxsim`, with its race, bounds and
--device sm_90   uninitialised-memory checks; only tests of kernels run, none without that module
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

DEVICES = ("cpu", "cuda", "sm_80", "sm_90")


@dataclass
class Path:
    """The implementation that a test takes, and the device of its tensors. `stats`: the simulator's launches."""

    kind: str
    device: str
    stats: list[Any] = field(default_factory=list)


def pytest_addoption(parser):
    parser.addoption("--device", choices=DEVICES, help="where kernels run: the interpreter, a GPU or a simulator")


def pytest_configure(config):
    if config.option.device is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    # operators read these when they are registered; tests ask for an implementation by name instead
    for name in ("TRITON_INTERPRET", "LMOPS_TRITON_ON_CPU"):
        os.environ.pop(name, None)
    import lmops

    if config.option.device == "cpu" and importlib.util.find_spec("triton"):
        # seen while Triton decorates the kernels, and again while they run (fixture `path`), but not by the processes
        # that other tests start
        os.environ["TRITON_INTERPRET"] = "1"
        import lmops.kernels

        for module in pkgutil.iter_modules(lmops.kernels.__path__):
            importlib.import_module(f"lmops.kernels.{module.name}")
        del os.environ["TRITON_INTERPRET"]
        from interpreter_bf16 import repair

        repair()


def pytest_report_header(config):
    where = {"cpu": "Triton's interpreter", "cuda": "the GPU"}.get(config.option.device, "the simulator ptxsim")
    return f"lmops: kernels run in {where} (--device {config.option.device})"


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        simulated = metafunc.config.option.device.startswith("sm_")
        kernels_only = simulated or metafunc.definition.get_closest_marker("kernels_only")
        metafunc.parametrize("path", ["triton"] if kernels_only else ["torch", "triton"], indirect=True)


def pytest_collection_modifyitems(config, items):
    simulated = config.option.device.startswith("sm_")
    chosen = [
        i
        for i in items
        if (simulated and "path" in i.fixturenames and not i.get_closest_marker("not_simulated"))
        or (not simulated and "launches" not in i.fixturenames)
    ]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
    items[:] = chosen
    if simulated and not importlib.util.find_spec("ptxsim"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="the module ptxsim cannot be imported"))


@pytest.fixture
def path(request):
    """Runs the test through the torch implementation and through the kernels, and asserts that they ran."""
    from lmops.testing import implementation

    option = request.config.option.device
    result = Path(request.param, "cuda" if option == "cuda" and request.param == "triton" else "cpu")
    with ExitStack() as stack:
        if option == "cpu" and result.kind == "triton":
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("TRITON_INTERPRET", "1")
        if option.startswith("sm_"):
            import ptxsim

            uninit = not request.node.get_closest_marker("fake_tensors")
            result.stats = stack.enter_context(ptxsim.simulate(arch=int(option[3:]), race=True, uninit=uninit))
        calls = stack.enter_context(implementation(result.kind, result.device))
        yield result
    assert calls.count, f"the test did not run the {result.kind} implementation"


@pytest.fixture
def launches(path):
    """Counters of the simulator, one object a launch. Tests that take it run in the simulator only."""
    return path.stats


@pytest.fixture(autouse=True)
def reproducible():
    """Seeds, and uninitialised memory filled with NaN (integers: the largest value)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
