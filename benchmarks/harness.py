"""What every benchmark shares: timing, the accuracy gate, peaks of the device, the table, CSV and plot.

A file `bench_foo.py` declares `BENCHMARKS`, a list of `Benchmark`, and `COMPILE`, a list of `Variant` for
`python -m benchmarks.compile_report`. A time is only taken of a provider whose result has passed
`lmops.testing.assert_accurate` against float64; a provider that cannot run is listed with the reason.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lmops.ops._register import OPERATORS
from lmops.testing import assert_accurate

Call = Callable[[], Any]
Backward = Literal[False, True, "and forward"]
OURS, EAGER, COMPILED = "lmops", "torch", "torch.compile"


@dataclass(frozen=True)
class Variant:
    """One case of the compile report: host code that launches kernels on CPU tensors, with a name of its own.

    tensor_core: the kernels with a `tl.dot` must use tensor cores: "native", the target's own instruction (wgmma on
    sm_90, tcgen05 on sm_100), or "any", also mma.sync there, right for tiles too small for the native one.
    wide: the least share of the bytes to and from global memory that must move 16 bytes a lane or more.
    """

    name: str
    run: Call
    tensor_core: Literal[False, "native", "any"] = False
    wide: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """One operation: its inputs by size, who computes it, and what it costs at least.

    inputs: (size, dtype, device) -> the tensors that all functions take.
    providers: functions of the inputs, ours under the name "lmops"; a peer imports its package inside, and raises an
        ImportError with the reason where it has nothing for such inputs.
    reference: plain torch; on float64 inputs it is the truth, on the given ones the baseline of the accuracy rule.
    eager: what "torch" and "torch.compile" run, `reference` by default.
    bytes_moved, operations: of the inputs: the fewest bytes to and from memory, and multiply-add work as 2 each.
    backward: the gradients of the floating-point inputs are computed; the forward is not timed, or "and forward" is.
    operator: the lmops operator whose implementation the table names. small: the size that pytest takes on a CPU.
    largest: sizes above it are left out, because the inputs would not fit the memory.
    sizes_on_cpu: instead of `sizes` there.
    """

    name: str
    operator: str
    inputs: Callable[[int, torch.dtype, torch.device], tuple[Tensor, ...]]
    providers: Mapping[str, Callable[..., Tensor]]
    reference: Callable[..., Tensor]
    bytes_moved: Callable[..., int]
    sizes: tuple[int, ...]
    small: int
    operations: Callable[..., int] | None = None
    eager: Callable[..., Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    backward: Backward = False
    largest: int | None = None
    sizes_on_cpu: tuple[int, ...] | None = None

    def all_providers(self) -> dict[str, Callable[..., Tensor]]:
        """Ours and peers, and torch eager and compiled, which every benchmark has."""
        eager = self.eager or self.reference
        return {**self.providers, EAGER: eager, COMPILED: torch.compile(eager, fullgraph=True, dynamic=False)}


@dataclass
class Result:
    """One provider at one size. Without times: `note` says why."""

    benchmark: str
    size: int
    shape: tuple[int, ...]
    dtype: str
    provider: str
    note: str = ""
    times: list[float] = field(default_factory=list)
    gbps: float | None = None
    tflops: float | None = None
    share: float | None = None
    share_of: str = ""
    ratio: float | None = None

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the times, in seconds."""
        q1, median, q3 = statistics.quantiles(self.times, n=4, method="inclusive")
        return q1, median, q3


@dataclass(frozen=True)
class Peak:
    """What the device reaches here: bytes/s of a copy and operations/s of a matmul of each dtype."""

    bandwidth: float
    operations: Mapping[torch.dtype, float]


def timer(device: torch.device) -> Callable[[Call], float]:
    """A function that gives the seconds of one call: by events after an L2 flush on a GPU, by the clock on a CPU."""
    if device.type == "cpu":

        def on_cpu(call: Call) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu

    flush = torch.empty(
        max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 26), device=device, dtype=torch.int8
    )

    def on_gpu(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # besides emptying L2, the flush keeps the GPU busy while the host queues the call
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return on_gpu


def time_interleaved(
    calls: Mapping[str, Call], once: Callable[[Call], float], seconds: float = 0.3, at_least: int = 5
) -> dict[str, list[float]]:
    """Times of each call, taken in turns so that a machine that slows down slows all; `seconds` of it each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    stop = time.perf_counter() + seconds * len(calls)
    while order and (len(times[order[0]]) < at_least or time.perf_counter() < stop):
        for name in order:
            times[name].append(once(calls[name]))
        order = order[1:] + order[:1]
    return times


def measure_peak(device: torch.device, dtypes: Iterable[torch.dtype]) -> Peak:
    """Copy bandwidth, and the matmul rate for each of `dtypes`."""
    once, gpu = timer(device), device.type != "cpu"
    source = torch.zeros(1 << (29 if gpu else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median(call: Call) -> float:
        return statistics.median(time_interleaved({"": call}, once)[""])

    bandwidth = 2 * source.nbytes / median(lambda: target.copy_(source))
    n = 8192 if gpu else 512
    operations = {}
    for dtype in dtypes:
        a = torch.ones(n, n, dtype=dtype, device=device)
        operations[dtype] = 2 * n**3 / median(partial(torch.matmul, a, a))
    return Peak(bandwidth, operations)


def bind(function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: Backward) -> Call:
    """The call to time: the function on the inputs, or its gradients, with the forward already done or in each call."""
    if not backward:
        return lambda: function(*inputs)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    y = function(*leaves)
    draw = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=draw, dtype=torch.float32).to(y.device, inputs[0].dtype).to(y.dtype)
    dy = torch.empty_like(y).copy_(dy)  # as y lies in memory, which is how most layers hand it back
    wanted = [t for t in leaves if t.requires_grad]
    if backward == "and forward":
        return lambda: torch.autograd.grad(function(*leaves), wanted, dy)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def outputs(call: Call) -> tuple[Tensor, ...]:
    """What the call returns, always as a tuple."""
    result = call()
    return result if isinstance(result, tuple) else (result,)


class Gate:
    """The truth and torch's error at one size; a provider must pass before it is timed."""

    def __init__(self, benchmark: Benchmark, inputs: Sequence[Tensor]) -> None:
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        self.truth = outputs(bind(benchmark.reference, wide, benchmark.backward))
        self.baseline = outputs(bind(benchmark.reference, inputs, benchmark.backward))

    def check(self, call: Call) -> None:
        """Raises AssertionError if a result of the call is worse than `assert_accurate` allows."""
        for actual, truth, baseline in zip(outputs(call), self.truth, self.baseline, strict=True):
            assert_accurate(actual, truth, baseline)


def admit(name: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], gate: Gate, backward: Backward) -> Call:
    """The provider's call to time, once its results are right. Raises RuntimeError with the reason otherwise."""
    try:
        # a compiled backward frees what it was given, unless told that it runs again
        with torch._functorch.config.patch(donated_buffer=False):
            call = bind(function, inputs, backward)
            gate.check(call)
    except ImportError as error:
        raise RuntimeError(f"not installed: {error.name}" if error.name else str(error)) from error
    except AssertionError as error:
        raise RuntimeError(f"wrong, so not timed: {error}") from error
    except Exception as error:  # whatever a peer raises is its reason; it stands in the table
        raise RuntimeError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    return call


def measure(
    benchmark: Benchmark,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    peak: Peak,
    with_compile: bool,
    seconds: float = 0.3,
) -> list[Result]:
    """Every provider at one size, checked, then timed in turns."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # or the ninth shape would meet the limit of recompilations
    inputs = benchmark.inputs(size, dtype, device)
    gate = Gate(benchmark, inputs)
    results, calls = {}, {}
    for name, function in benchmark.all_providers().items():
        shape, dtype_name = tuple(inputs[0].shape), str(dtype).removeprefix("torch.")
        results[name] = result = Result(benchmark.name, size, shape, dtype_name, name)
        if name == COMPILED and not with_compile:
            result.note = "left out, --compile includes it"
            continue
        try:
            calls[name] = admit(name, function, inputs, gate, benchmark.backward)
        except RuntimeError as error:
            result.note = str(error)
    for name, times in time_interleaved(calls, timer(device), seconds).items():
        results[name].times = times
        rate(results[name], benchmark, inputs, peak)
    for name in calls:
        if EAGER in calls:
            results[name].ratio = results[EAGER].quartiles()[1] / results[name].quartiles()[1]
    return list(results.values())


def rate(result: Result, benchmark: Benchmark, inputs: Sequence[Tensor], peak: Peak) -> None:
    """Fill in the rates, and the share of the peak that bounds this operation: the one that it comes closer to."""
    median = result.quartiles()[1]
    moved = benchmark.bytes_moved(*inputs) / median
    result.gbps, result.share, result.share_of = moved * 1e-9, moved / peak.bandwidth, "copy"
    if benchmark.operations:
        done = benchmark.operations(*inputs) / median
        result.tflops = done * 1e-12
        share = done / peak.operations[inputs[0].dtype]
        if share > result.share:
            result.share, result.share_of = share, "matmul"


def machine(device: torch.device) -> dict[str, str]:
    """What a time depends on beside the code: a column each of the CSV."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "machine": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def cpu_name() -> str:
    """The processor's model where the system tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def run(
    benchmarks: Sequence[Benchmark],
    device: torch.device,
    *,
    sizes: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    with_compile: bool | None = None,
    seconds: float = 0.3,
    echo: Callable[[str], None] = print,
) -> list[Result]:
    """Measure all of a file's benchmarks and print a table of each as it is ready."""
    with_compile = device.type == "cuda" if with_compile is None else with_compile
    where = machine(device)
    echo(", ".join(f"{key} {value}" for key, value in where.items()))
    needs = {d for b in benchmarks if b.operations for d in dtypes or b.dtypes}
    peak = measure_peak(device, needs)
    rates = "".join(f", matmul {rate * 1e-12:.3g} TFLOP/s in {dtype}" for dtype, rate in peak.operations.items())
    echo(f"measured peak: copy {peak.bandwidth * 1e-9:.1f} GB/s{rates}")
    echo("medians [quartiles] of repetitions taken in turns; every result was checked against float64 before")
    if device.type == "cpu":
        echo("caches are not flushed on a CPU, so small inputs can exceed the peak; ratios are what to compare")
        if not with_compile:
            echo("torch.compile takes 12-50 s a shape on a CPU and is left out without --compile")
    results = []
    for benchmark in benchmarks:
        kind, why = OPERATORS[benchmark.operator].implementation(device.type)
        echo(f"\n{benchmark.name}: {OURS} runs its {kind} implementation ({why})")
        given = sizes or (device.type == "cpu" and benchmark.sizes_on_cpu) or benchmark.sizes
        chosen = [size for size in given if size <= (benchmark.largest or size)]
        if len(chosen) < len(given):
            echo(f"sizes above {benchmark.largest} are left out: their inputs would not fit the memory")
        rows = [
            result
            for dtype in dtypes or benchmark.dtypes
            for size in chosen
            for result in measure(benchmark, size, dtype, device, peak=peak, with_compile=with_compile, seconds=seconds)
        ]
        unit = "TFLOP/s" if benchmark.operations else "GB/s"
        echo(table(["size", "dtype", "provider", "ms", "[quartiles]", unit, "peak", "x torch", ""], map(cells, rows)))
        results += rows
    return results


def cells(r: Result) -> list[str]:
    """A result as a line of the table."""
    head = [str(r.size), r.dtype, r.provider]
    if not r.times:
        return [*head, "-", "", "", "", "", r.note]
    q1, median, q3 = (f"{1e3 * t:.4g}" for t in r.quartiles())
    ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
    rate = f"{r.gbps:.1f}" if r.tflops is None else f"{r.tflops:.4g}"
    return [*head, median, f"[{q1} {q3}]", rate, f"{r.share:.0%} of {r.share_of}", ratio, r.note]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines with columns as wide as their longest cell; whole when piped, unlike a table fitted to a terminal."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_csv(path: Path, results: Iterable[Result], device: torch.device) -> None:
    """One row a size and provider, also where there is no time."""
    rows = []
    for r in results:
        q1, median, q3 = r.quartiles() if r.times else (None, None, None)
        what = {"benchmark": r.benchmark, "size": r.size, "shape": "x".join(map(str, r.shape)), "dtype": r.dtype}
        spread = {"median_s": median, "q1_s": q1, "q3_s": q3, "repetitions": len(r.times)}
        rates = {"gb_per_s": r.gbps, "tflop_per_s": r.tflops, "share": r.share, "share_of": r.share_of}
        done = {"provider": r.provider, **spread, **rates, "ratio_to_torch": r.ratio, "note": r.note}
        rows.append({**what, **done, **machine(device)})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, results: Sequence[Result]) -> None:
    """The table's rates by size, a panel for every benchmark and dtype, quartiles as bars. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.benchmark, r.dtype) for r in results))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r.provider for r in results if r.times))}
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.5 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(every, panels, strict=False):
        timed = [r for r in results if (r.benchmark, r.dtype) == panel and r.times]
        unit = "TFLOP/s" if any(r.tflops for r in timed) else "GB/s"
        for provider in dict.fromkeys(r.provider for r in timed):
            line = sorted((r for r in timed if r.provider == provider), key=lambda r: r.size)
            points = [(r.size, r.tflops or r.gbps or 0.0, r.quartiles()) for r in line]
            below = [rate * (1 - median / q3) for _, rate, (_, median, q3) in points]
            above = [rate * (median / q1 - 1) for _, rate, (q1, median, _) in points]
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.errorbar(x, y, [below, above], marker="o", label=provider, color=colors[provider])
        axes.set(title=" ".join(panel), xlabel="size", ylabel=unit, xscale="log", ylim=(0, None))
        if timed:
            axes.legend(fontsize="small")
    for axes in list(every)[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path)
