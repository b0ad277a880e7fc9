"""Every kernel compiled for sm_80, sm_90, sm_100 and gfx942, at some of its tiles; and that the report can fail.

`python -m benchmarks.compile_report`, `make report`, is the same for every shipped tile; it takes many minutes.

The report runs in processes of its own: here the kernels were imported for Triton's interpreter.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not here: tests of an installed package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.compile_report import TARGETS, Row, broken_rules, occupancy, width_figures  # noqa: E402


def rows_of(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("["), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


SOME = (
    "softmax-bf16-4096",
    "softmax-bf16-per-row-50257",
    "attention-bf16-128-causal",
    "attention-bf16-64-bias-gradient",
    "sampling-bf16-128256",
    "sampling-bf16-top-p-1000",
    "sampling-bf16-filter-logits-8192",
    "sampling-bf16-verify-128256",
    "loss-bf16-32000",
    "loss-kl-bf16-1003",
    "quantized-matmul-int4-g128-zeros-bf16",
    "quantized-matmul-dx-int4-g128-bf16",
    "quantized-embedding-int4-g128-zeros",
    "int8-matmul-bf16-64",
    "norm-layer-bf16-4096",
    "norm-rms-fp16-32768",
    "rope-bf16-64",
    "gated-swiglu-bf16-packed-3072",
    "paged-cache-store-bf16-rope",
    "paged-cache-store-int4-rope",
    "paged-cache-copy-bf16",
    "paged-cache-append",
    "paged-attention-bf16-native-decode",
    "paged-attention-bf16-int8-chunk",
)


@pytest.fixture(scope="module")
def shipped():
    return rows_of("-m", "benchmarks.compile_report", "--json", "--only", *SOME)


@pytest.mark.parametrize("target", TARGETS)
def test_no_rule_is_broken(shipped, target):
    rows = [row for row in shipped[1] if row["target"] == target]
    assert rows
    broken = [f"{r['variant']} {r['kernel']}: {rule}" for r in rows for rule in r["broken"]]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(shipped, target):
    files = sorted((ROOT / "kernels").glob("*.py"))
    functions = [
        node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    kernels = {function.name for function in functions if function.name.endswith("_kernel")}
    assert "softmax_forward_kernel" in kernels
    missing = kernels - {row["kernel"] for row in shipped[1] if row["target"] == target}
    assert not missing, f"{missing}: add a variant to the COMPILE list of the operator's benchmark"


# the host's part of every variant of the report: launches are counted, and nothing is compiled
LAUNCHES = """
import json, sys
from triton.runtime.jit import JITFunction
from benchmarks.compile_report import TARGETS, compile_only, find_variants
from lmops.testing import implementation

launched, result = [], []
for name in sys.argv[1:]:
    with implementation("triton"), compile_only(TARGETS[name].gpu):
        JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launched.append(self.__name__)
        for variant in find_variants():
            launched.clear()
            try:
                variant.run()
                result.append((name, variant.name, len(launched)))
            except Exception as error:
                result.append((name, variant.name, repr(error)))
print(json.dumps(result))
"""


def test_every_variant_of_the_report_launches():
    _, launches = rows_of("-c", LAUNCHES, "sm_90", "gfx942")
    assert len(launches) > 500
    assert not [launch for launch in launches if not isinstance(launch[2], int) or not launch[2]]


def test_figures_are_there(shipped):
    status, rows = shipped
    assert status == int(any(row["broken"] for row in rows))
    for row in rows:
        if row["kernel"]:
            assert 8 <= row["registers"] <= 512, row
            assert 0 < row["occupancy"] <= 1, row
            assert 0 <= row["wide_share"] <= 1, row
            assert row["warps"] >= 1, row
            assert row["tile"], row


# one of each kind of bad kernel, and good ones beside them
EXAMPLES = """
import json, os, sys, time
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.compile_report import TARGETS, report
from benchmarks.harness import Variant


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, cols, depth = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + start + rows * k + depth[None, :])
        b = tl.load(b_ptr + start * N + depth[:, None] * N + cols)
        c = tl.dot(a, b, c)
    tl.store(c_ptr + rows * N + cols, c)


@triton.jit
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr, STEP: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n * STEP))


def product(m, n, k, num_warps, num_stages=2):
    def run():
        a, b, c = torch.empty(m, 512, dtype=torch.float16), torch.empty(512, n, dtype=torch.float16), torch.empty(m, n)
        product_kernel[(1,)](a, b, c, 512, M=m, N=n, K=k, num_warps=num_warps, num_stages=num_stages)

    return run


def copy(step):
    return lambda: copy_kernel[(1,)](torch.empty(4096 * step), torch.empty(4096), N=4096, STEP=step)


def wrong():
    raise ValueError("no such tile")


good = [Variant("good", product(128, 128, 64, 8), tensor_core="native"), Variant("copy", copy(1), wide=1)]
bad = [
    Variant("spills", product(256, 256, 32, 4), tensor_core="native"),
    Variant("shared", product(128, 256, 64, 8, num_stages=6), tensor_core="native"),
    Variant("small-any", product(16, 16, 16, 1), tensor_core="any"),
    Variant("small-native", product(16, 16, 16, 1), tensor_core="native"),
    Variant("no-product", copy(1), tensor_core="any"),
    Variant("narrow", copy(3), wide=1),
]
lost = [Variant("aborts", os.abort), Variant("raises", wrong), Variant("nothing", lambda: None)]
every = list(TARGETS.values())
rows = report(good, every, save=Path(sys.argv[1])) + report(bad, [TARGETS["sm_80"], TARGETS["sm_90"]])
rows += report(lost, every[:1]) + report([Variant("hangs", lambda: time.sleep(100))], every[:1], timeout=0.5)
print(json.dumps([asdict(row) for row in rows]))
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    script = folder / "examples.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{EXAMPLES}")
    rows = rows_of(script, str(folder))[1]
    found = {(row["variant"], row["target"]): row for row in rows}
    assert len(found) == len(rows)
    return found, folder


def broken(examples, variant, target="sm_90"):
    return "; ".join(examples[0][variant, target]["broken"])


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma_")]
)
def test_a_good_kernel_breaks_nothing(examples, target, instruction):
    row = examples[0]["good", target]
    assert row["broken"] == []
    assert row["tensor_core"].startswith(instruction)
    assert row["tile"] == "M=128 N=128 K=64"
    assert examples[0]["copy", target]["broken"] == []
    assert examples[0]["copy", target]["wide_share"] == 1
    assert examples[0]["copy", target]["tensor_core"] == ""


def test_binaries_are_saved(examples):
    for target in TARGETS:
        binary = examples[1] / f"product_kernel-good-{target}.{'hsaco' if target == 'gfx942' else 'cubin'}"
        assert binary.read_bytes().startswith(b"\x7fELF")


def test_a_spill_is_broken(examples):
    for target in ("sm_80", "sm_90"):
        row = examples[0]["spills", target]
        assert row["spill_bytes"] > 0
        assert row["stack_bytes"] > 0
        assert f"spills {row['spill_bytes']} bytes" in row["broken"]


def test_an_advisory_of_ptxas_is_broken(examples):
    # too few registers for an accumulator of 256 x 256: ptxas serialises wgmma and says so
    assert "wgmma" in broken(examples, "spills")


def test_too_much_shared_memory_is_broken(examples):
    assert "bytes of shared memory, a block has 166912" in broken(examples, "shared", "sm_80")
    assert "bytes of shared memory, a block has 232448" in broken(examples, "shared", "sm_90")


def test_a_missing_tensor_core_instruction_is_broken(examples):
    assert "uses no tensor core, expected any" in broken(examples, "no-product")
    assert "uses HMMA, expected native" in broken(examples, "small-native")
    assert broken(examples, "small-any") == ""
    assert broken(examples, "small-native", "sm_80") == ""


def test_narrow_accesses_are_broken_where_wide_ones_are_expected(examples):
    row = examples[0]["narrow", "sm_90"]
    # loads of 4 bytes, stores of 16: half the bytes
    assert row["wide_share"] == pytest.approx(0.5)
    assert "moves 50% of the bytes by accesses of 16 bytes a lane, expected 100%" in row["broken"][0]
    assert f"{row['narrow']} accesses are narrower" in row["broken"][0]


def test_a_lost_compilation_is_a_row(examples):
    assert "crashed with status -6" in broken(examples, "aborts", "sm_80")
    assert "failed: ValueError: no such tile" in broken(examples, "raises", "sm_80")
    assert "ran longer than 0.5 s" in broken(examples, "hangs", "sm_80")
    assert "launched no kernel" in broken(examples, "nothing", "sm_80")


def test_rules():
    sm_90, gfx942 = TARGETS["sm_90"], TARGETS["gfx942"]
    assert broken_rules(Row("v", "sm_90", threads=1024, shared_bytes=232_448), sm_90) == []
    assert "233472 bytes of shared" in broken_rules(Row("v", "sm_90", shared_bytes=233_472), sm_90)[0]
    assert "needs 2048 threads" in broken_rules(Row("v", "gfx942", threads=2048), gfx942)[0]
    assert broken_rules(Row("v", "sm_90", stack_bytes=8), sm_90) == ["has 8 bytes of stack"]


def test_occupancy_and_widths():
    # figures of the vendors' occupancy tables
    assert occupancy(TARGETS["sm_80"], registers=32, warps=8, shared=0) == 1
    assert occupancy(TARGETS["sm_80"], registers=255, warps=8, shared=0) == 8 / 64
    assert occupancy(TARGETS["sm_90"], registers=168, warps=4, shared=0) == 12 / 64
    assert occupancy(TARGETS["sm_90"], registers=32, warps=4, shared=100 << 10) == 8 / 64
    assert occupancy(TARGETS["sm_90"], registers=32, warps=1, shared=0) == 32 / 64
    assert occupancy(TARGETS["gfx942"], registers=128, warps=4, shared=0) == 16 / 32
    assert occupancy(TARGETS["gfx942"], registers=512, warps=4, shared=0) == 4 / 32
    assert width_figures([16, 16, 2]) == (32 / 34, 1)
    assert width_figures([]) == (1.0, 0)
