"""The benchmark harness: its command line, table, CSV and plot, and that a wrong result is refused a time."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not here: tests of an installed package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import harness  # noqa: E402

CPU = torch.device("cpu")


def bench(**changes):
    def inputs(size, dtype, device):
        return (torch.randn(4, size, device=device).to(dtype),)

    given = {
        "providers": {"lmops": lambda x: x.float().exp().to(x.dtype)},
        "reference": torch.exp,
        "bytes_moved": lambda x: 2 * x.nbytes,
        "sizes": (64,),
        "small": 64,
        "dtypes": (torch.float32,),
    }
    return harness.Benchmark("exp", "softmax_forward", inputs, **{**given, **changes})


def measure(**changes):
    peak = harness.Peak(1e9, {torch.float32: 1e9})
    results = harness.measure(bench(**changes), 64, torch.float32, CPU, peak=peak, with_compile=False, seconds=0.01)
    return {r.provider: r for r in results}


def test_a_correct_provider_is_timed_and_rated():
    result = measure(operations=lambda x: x.numel())["lmops"]
    q1, median, q3 = result.quartiles()
    assert len(result.times) >= 5
    assert 0 < q1 <= median <= q3
    assert result.gbps == pytest.approx(2 * 4 * 64 * 4 / median * 1e-9)
    assert result.tflops == pytest.approx(4 * 64 / median * 1e-12)
    # 8 bytes an element against 1 operation: at equal peaks the bandwidth is nearer
    assert (result.share_of, result.share) == ("copy", pytest.approx(result.gbps))
    assert result.ratio > 0


def test_the_nearer_peak_is_named():
    result = measure(operations=lambda x: 100 * x.numel())["torch"]
    assert (result.share_of, result.share) == ("matmul", pytest.approx(result.tflops * 1e3))
    assert result.ratio == 1


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_provider_is_refused_a_time(backward):
    results = measure(providers={"lmops": lambda x: torch.exp(x) * 1.001}, backward=backward)
    assert results["lmops"].times == []
    assert results["lmops"].note.startswith("wrong, so not timed: max error")
    assert results["torch"].times


def test_the_gradient_is_what_is_checked():
    def right_value_wrong_gradient(x):
        return torch.exp(x.detach()) + x - x.detach()

    assert measure(providers={"lmops": right_value_wrong_gradient})["lmops"].times
    assert "wrong" in measure(providers={"lmops": right_value_wrong_gradient}, backward=True)["lmops"].note


def test_forward_and_backward_are_timed_together():
    calls = []

    def counted(x):
        calls.append(x)
        return torch.exp(x)

    x = torch.randn(8)
    for backward, forwards in ((True, 1), ("and forward", 4)):
        call = harness.bind(counted, (x,), backward)
        gradients = [call()[0] for _ in range(3)]
        assert len(calls) == forwards
        assert all(torch.equal(g, gradients[0]) for g in gradients)
        calls.clear()


def test_gradients_come_in_the_layout_of_the_result():
    given = []

    def transposed(x):
        y = x.clone().mT
        y.register_hook(lambda dy: given.append(dy.stride()))
        return y

    harness.bind(transposed, (torch.randn(3, 5),), True)()
    assert given == [(1, 5)]


def test_what_cannot_run_is_listed_with_the_reason():
    def missing(x):
        import a_package_that_nobody_has

        return a_package_that_nobody_has.exp(x)

    def nothing_here(x):
        raise ImportError("not for a CPU")

    def refuses(x):
        raise NotImplementedError("only float16\nand more")

    results = measure(providers={"lmops": torch.exp, "peer": missing, "third": nothing_here, "other": refuses})
    assert results["peer"].note == "not installed: a_package_that_nobody_has"
    assert results["third"].note == "not for a CPU"
    assert results["other"].note == "NotImplementedError: only float16"
    assert "--compile" in results["torch.compile"].note
    assert [p for p, r in results.items() if r.times] == ["lmops", "torch"]


def test_calls_are_taken_in_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = harness.time_interleaved(calls, harness.timer(CPU), seconds=0, at_least=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    timed = order[2:]
    assert all({timed[i], timed[i + 1]} == {"a", "b"} for i in range(0, 8, 2))


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "softmax.csv", tmp_path / "softmax.png"
    command = [sys.executable, "-m", "benchmarks", "softmax", "--device", "cpu", "--sizes", "32", "50"]
    command += ["--dtypes", "fp32", "--seconds", "0.01", "--csv", str(table), "--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lmops runs its torch implementation (tensors on the CPU)" in done.stdout
    assert f"threads {torch.get_num_threads()}" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {(r["benchmark"], r["size"], r["provider"]) for r in rows}
    assert len(cases) == len(rows)
    for benchmark in ("softmax", "softmax backward", "softmax causal"):
        assert {size for name, size, _ in cases if name == benchmark} == {"32", "50"}
        assert {"lmops", "torch", "torch.compile"} <= {p for name, _, p in cases if name == benchmark}
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["machine"]
        assert row["dtype"] == "float32"
        if row["provider"] in ("lmops", "torch"):
            assert 0 < float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"])
            assert float(row["gb_per_s"]) > 0
            assert float(row["share"]) > 0
            assert int(row["repetitions"]) >= 5
            assert f"{1e3 * float(row['median_s']):.4g}" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["softmacks"], "there is no benchmark 'softmacks'; there are: "),
        ([], "arguments are required: name"),
        (["softmax", "--csv", "no/such/folder/x.csv"], "the folder of no/such/folder/x.csv does not exist"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_an_unknown_name_lists_the_benchmarks(capsys):
    with pytest.raises(SystemExit):
        cli.main(["softmacks"])
    listed = capsys.readouterr().err.partition("there are: ")[2].strip().split(", ")
    assert listed == sorted(f.stem.removeprefix("bench_") for f in (ROOT / "benchmarks").glob("bench_*.py"))
    assert "softmax" in listed


def test_a_wrong_result_of_ours_is_the_exit_status(monkeypatch, capsys):
    from benchmarks import bench_softmax

    arguments = ["softmax", "--device", "cpu", "--sizes", "16", "--seconds", "0", "--dtypes", "fp32"]
    monkeypatch.setattr(bench_softmax, "BENCHMARKS", [bench()])
    assert cli.main(arguments) == 0
    monkeypatch.setattr(bench_softmax, "BENCHMARKS", [bench(providers={"lmops": torch.sin})])
    assert cli.main(arguments) == 1
    assert "wrong, so not timed" in capsys.readouterr().out


def test_plot_needs_matplotlib(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        cli.main(["softmax", "--plot", "x.png"])
    assert "--plot needs matplotlib: pip install 'lmops[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("causal", [False, True])
def test_attention_truth_by_blocks_is_the_reference(causal, monkeypatch):
    from benchmarks import bench_attention as bench
    from lmops.reference.attention import attention as reference

    def whole(q, k, v):
        return reference(q, k, v, right=0 if causal else None)[0]

    by_blocks = bench.case(16, causal, False).reference
    inputs = [t.double() for t in bench.projected(64, 37, torch.float32, CPU)]
    expected = [whole(*inputs), *harness.bind(whole, inputs, True)()]
    for scores_at_once in (bench.SCORES_AT_ONCE, 5 * 13 * 4 * 37, 1):
        monkeypatch.setattr(bench, "SCORES_AT_ONCE", scores_at_once)
        for actual, wanted in zip(
            [by_blocks(*inputs), *harness.bind(by_blocks, inputs, True)()], expected, strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_attention_providers_and_counts():
    from benchmarks import bench_attention as bench

    assert len({b.name for b in bench.BENCHMARKS}) == len(bench.BENCHMARKS) == 12
    inputs = bench.projected(64, 256, torch.bfloat16, CPU)
    n_batch, n_heads, length, dim = inputs[0].shape
    assert (length, dim) == (256, 64)
    product = 2 * n_batch * n_heads * length**2 * dim
    for name, products, tensors in (("forward", 2, 4), ("backward", 5, 8), ("forward and backward", 7, 12)):
        full, causal = (
            next(b for b in bench.BENCHMARKS if b.name == f"attention {name} 64{end}") for end in ("", " causal")
        )
        assert full.operations(*inputs) == 2 * causal.operations(*inputs) == products * product
        assert full.bytes_moved(*inputs) == causal.bytes_moved(*inputs) == tensors * inputs[0].nbytes
        peak = harness.Peak(1e9, {torch.bfloat16: 1e9})
        results = harness.measure(full, 64, torch.bfloat16, CPU, peak=peak, with_compile=False, seconds=0)
        timed = {r.provider for r in results if r.times}
        assert {"lmops", "torch", "torch flash", "torch math"} <= timed
        notes = {r.provider: r.note for r in results}
        assert notes["torch cuDNN"] == "torch has no such kernel for these inputs on cpu"
        assert harness.cells(results[0])[6].endswith("of matmul")


def test_plot_puts_many_benchmarks_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    shared = {"shape": (1,), "dtype": "float32", "gbps": 1.0}
    results = [
        harness.Result(f"b{i}", size, provider=name, times=[0.1, 0.2], tflops=size / 100 if i else None, **shared)
        for i in range(5)
        for size in (128, 512)
        for name in ("lmops", "torch")
    ]
    harness.plot(tmp_path / "all.png", results)
    header = (tmp_path / "all.png").read_bytes()[16:24]
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
    assert (width, height) == (2400, 700)  # four panels of 6 x 3.5 inches, and one below them


def test_overhead_is_measured_without_a_gpu():
    """In a process of its own: its driver stays."""
    code = (
        "import sys; from benchmarks import bench_overhead as b; operators = b.operators;"
        "b.operators = lambda: {k: v for k, v in operators().items() if k in ('softmax', 'int8_matmul')};"
        "sys.argv = ['bench_overhead', '--rounds', '1']; b.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[2:]}
    assert {name: row[0] for name, row in rows.items()} == {"softmax": "1", "int8_matmul": "3"}
    for _, direct, with_torch, call, ratio in rows.values():
        assert min(float(direct), float(call), float(ratio)) > 0
        assert float(with_torch) == 0
