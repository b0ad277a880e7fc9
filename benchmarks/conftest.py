"""`pytest benchmarks/`: every provider of every `BENCHMARKS` list through pytest-benchmark, at one size.

On a CPU that is each benchmark's `small` size; torch.compile, which takes 12-50 s a shape there, is left out. On a GPU
it is the first of its sizes. A provider whose result is wrong fails, and one that is not installed is skipped.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import COMPILED, OURS, Benchmark, Gate, admit


class BenchmarkFile(pytest.Module):
    """A bench_*.py: its `BENCHMARKS`, and test functions if it has some."""

    def collect(self):
        yield from super().collect()
        for benchmark in getattr(self.obj, "BENCHMARKS", []):
            for dtype in benchmark.dtypes:
                for provider in benchmark.all_providers():
                    name = f"{benchmark.name} {str(dtype).removeprefix('torch.')} {provider}".replace(" ", "-")
                    yield pytest.Function.from_parent(self, name=name, callobj=case(benchmark, dtype, provider))


def case(benchmark: Benchmark, dtype: torch.dtype, provider: str):
    """A test that checks the provider's result, then times it."""

    def test(request):
        gpu = torch.cuda.is_available()
        if provider == COMPILED and not gpu:
            pytest.skip("takes 12-50 s a shape on a CPU; `python -m benchmarks NAME --compile` includes it")
        # asked for here, so that where the plugin is missing this is the one line to read
        if not request.config.pluginmanager.hasplugin("benchmark"):
            pytest.fail("needs pytest-benchmark: pip install 'lmops[bench]'", pytrace=False)
        torch.manual_seed(0)
        device = torch.device("cuda" if gpu else "cpu")
        inputs = benchmark.inputs(benchmark.sizes[0] if gpu else benchmark.small, dtype, device)
        function = benchmark.all_providers()[provider]
        try:
            call = admit(provider, function, inputs, Gate(benchmark, inputs), benchmark.backward)
        except RuntimeError as error:
            if provider == OURS or not isinstance(error.__cause__, ImportError):
                raise
            pytest.skip(str(error))

        def finished():
            call()
            if gpu:
                torch.cuda.synchronize()

        timed = request.getfixturevalue("benchmark")
        timed.group = f"{benchmark.name}, {dtype}, {'x'.join(map(str, inputs[0].shape))}"
        # a fixed number: calibrated on a busy machine, a call of a millisecond may be repeated for minutes
        timed.pedantic(finished, rounds=100 if gpu else 20, warmup_rounds=2)

    return test


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.startswith("bench_"):
        return BenchmarkFile.from_parent(parent, path=module_path)
    return None
