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


def test_what_cannot_run_is_listed_with_the_reason():
    def missing(x):
        import a_package_that_nobody_has

        return a_package_that_nobody_has.exp(x)

    def refuses(x):
        raise NotImplementedError("only float16\nand more")

    results = measure(providers={"lmops": torch.exp, "peer": missing, "other": refuses})
    assert results["peer"].note == "not installed: a_package_that_nobody_has"
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
