"""Compile every kernel at every shipped tile for GPUs that this machine need not have, and check what comes out.

    python -m benchmarks.compile_report
    python -m benchmarks.compile_report --only softmax-bf16 --target sm_90 --save binaries
    python -m benchmarks.compile_report --json

The launchers of the operators run on CPU tensors under a Triton driver that only compiles, so tiles, flags and
specialisations (divisibility by 16, arguments equal to 1) are the shipped ones. The cases are the `COMPILE` lists
beside the benchmarks. Every case is compiled in a process of its own: a compiler that aborts, or hangs, is a row.

Columns:

registers, spill, stack, shared   a thread's registers (gfx942: VGPRs) and bytes of spill stores and loads together,
    its stack in bytes (spills, and arrays that stay in local memory), and a block's bytes of shared memory (LDS).
occupancy  warps in flight over the most that the target holds, as registers, shared memory, warps and blocks allow.
16 B       share of the bytes of the instructions that load or store global memory which go by instructions of at
    least 16 bytes a lane, or by TMA. An instruction weighs what it moves, whether it runs once or in a loop: the code
    is not run, so trip counts are unknown. Loads of scalars by the scalar unit, and atomics, are not counted.
narrow     how many instructions move less than 16 bytes a lane. One a temperature, and some at the edges of rows
    whose length is not a multiple of 16 bytes, are in the nature of an operation; a main loop has none.
tensor     the tensor-core instruction found.

Broken rules, which make the exit status 1: a spill, or a stack; more shared memory, or threads a block, than the
target has; no tensor-core instruction, or a lower share of wide accesses, where the case expects it; an advisory of
ptxas, such as C7510 and C7515 about serialised wgmma; a compilation that failed, crashed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver as runtime_driver
from triton.runtime.jit import JITFunction

import benchmarks
from benchmarks.harness import Variant, table
from lmops.testing import implementation


@dataclass(frozen=True)
class Target:
    """A GPU and its limits. A core is an SM or a CU; each has four partitions with 512 registers a lane."""

    name: str
    gpu: GPUTarget
    shared_a_block: int
    shared_a_core: int
    shared_reserved: int  # by the driver, for every block
    warps_a_partition: int
    blocks_a_core: int
    native_tensor_core: str


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1 << 10, 16, 32, r"[HIDB]MMA"),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1 << 10, 16, 32, r"[HIQB]GMMA"),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1 << 10, 16, 32, r"UTC\w*MMA"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 8, 16, r"v_mfma"),
    )
}
THREADS_A_BLOCK = 1024


@dataclass
class Row:
    """A kernel of a variant, compiled for a target; without a kernel: why there is none, in `broken`."""

    variant: str
    target: str
    kernel: str = ""
    tile: str = ""
    warps: int = 0
    threads: int = 0
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float = 0.0
    wide_share: float = 1.0
    narrow: int = 0
    tensor_core: str = ""
    advisories: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class CompileOnlyDriver:
    """What Triton's launch path asks of a driver up to the compiled kernel, for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # compiled kernels are kept by device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside the block `kernel[grid](...)` on CPU tensors compiles for `target` and launches nothing.

    Yields the list of compiled kernels, each once, in the order of their launches. Not for several threads at once.
    """
    kernels: dict[str, Any] = {}
    compiled: list[Any] = []
    real_run, real_driver = JITFunction.run, runtime_driver._active

    def run(self, *args, grid, warmup, **kwargs):
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in kernels:
            kernels[kernel.hash] = kernel
            compiled.append(kernel)
        # nothing: what was not loaded must not be launched again

    runtime_driver.set_active(CompileOnlyDriver(target))
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = real_run
        runtime_driver._active = real_driver


def compile_variant(variant: Variant, target: Target, save: Path | None = None) -> list[Row]:
    """A row for every kernel that the variant launches, with the rules that it breaks."""
    with implementation("triton"), compile_only(target.gpu) as kernels:
        variant.run()
    with_dot = ["tt.dot" in kernel.asm["ttir"] for kernel in kernels]
    rows = []
    for i, kernel in enumerate(kernels):
        row = inspect_kernel(kernel, variant, target)
        # of a variant with tensor cores, its products must use them; a sum of rows beside them need not
        needs = variant.tensor_core if with_dot[i] or not any(with_dot) else False
        row.broken = broken_rules(row, target, tensor_core=needs, wide=variant.wide)
        rows.append(row)
        if save:
            again = sum(earlier.kernel == row.kernel for earlier in rows[:-1])
            suffix = f"-{again + 1}" if again else ""
            binary = "cubin" if target.gpu.backend == "cuda" else "hsaco"
            name = f"{row.kernel}-{variant.name}-{target.name}{suffix}.{binary}"
            save.joinpath(name).write_bytes(kernel.asm[binary])
    return rows or [Row(variant.name, target.name, broken=["it launched no kernel"])]


def inspect_kernel(kernel: Any, variant: Variant, target: Target) -> Row:
    """The figures of a compiled kernel; `broken` is left to `broken_rules`."""
    metadata = kernel.metadata
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    row = Row(
        variant.name,
        target.name,
        metadata.name,
        tile=" ".join(
            name if value is True else f"{name}={value}"
            for name, value in constants.items()
            if name.isupper() and value is not False
        ),
        warps=metadata.num_warps,
        threads=metadata.num_warps * target.gpu.warp_size,
        shared_bytes=metadata.shared,
    )
    if target.gpu.backend == "cuda":
        inspect_nvidia(row, kernel)
    else:
        inspect_amd(row, kernel.asm["amdgcn"])
    row.occupancy = occupancy(target, row.registers, row.warps, row.shared_bytes)
    return row


NVIDIA_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS)\.([\w.]+)|\b(UTMALDG|UTMASTG|UBLKCP)\b")
NVIDIA_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
NVIDIA_TENSOR = re.compile(r"\b(?:UTC\w*|[HIDQBO]G?)MMA\b")
AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(?:load|store)_(?:lds_)?(\w+)", re.MULTILINE)
AMD_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}
AMD_TENSOR = re.compile(r"\bv_s?mfma\w*")


def inspect_nvidia(row: Row, kernel: Any) -> None:
    """Registers, stack and instructions from the binary; spills and advisories from what ptxas says about it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used, f"cuobjdump gave no resource usage: {text[:400]}"
    row.registers, row.stack_bytes = int(used[1]), int(used[2])
    widths = []
    for suffixes, bulk in NVIDIA_ACCESS.findall(text):
        found = [NVIDIA_WIDTHS[s] for s in suffixes.split(".") if s in NVIDIA_WIDTHS]
        widths.append(16 if bulk else found[-1] if found else 4)
    row.wide_share, row.narrow = width_figures(widths)
    row.tensor_core = ", ".join(sorted(set(NVIDIA_TENSOR.findall(text))))
    log = ptxas_log(kernel)
    row.spill_bytes = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    # "ptxas info    : (C7510) Potential Performance Loss: ..."; not C7519, "warpgroup.arrive is injected in around line
    # N by compiler to allow use of registers in GMMA", which is one instruction and no serialisation
    notes = [
        line.partition(":")[2].strip() for line in log.splitlines() if re.search(r"\(C(?!7519)\d+\)|warning", line)
    ]
    row.advisories = sorted({re.sub(r" in (the )?function.*", "", advisory) for advisory in notes})


def ptxas_log(kernel: Any) -> str:
    """What ptxas prints: the backend's last stage once more, with its own flags, since a cached kernel has no log."""
    backend = make_backend(kernel.metadata.target)
    before, said = knobs.nvidia.dump_ptxas_log, io.StringIO()
    knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(said):
            backend.make_cubin(kernel.asm["ptx"], {}, kernel.metadata, kernel.metadata.target.arch)
    finally:
        knobs.nvidia.dump_ptxas_log = before
    assert "bytes spill stores" in said.getvalue(), f"ptxas did not report spills: {said.getvalue()[:400]}"
    return said.getvalue()


def inspect_amd(row: Row, text: str) -> None:
    """Everything from the assembly text and the metadata at its end."""

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        assert found, f"the assembly has no .{name}"
        return int(found[1])

    row.registers, row.stack_bytes = number("vgpr_count"), number("private_segment_fixed_size")
    # counted in registers of 4 bytes a lane; scalar registers spill to lanes of vector registers, which is a cost too
    row.spill_bytes = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    row.shared_bytes = max(row.shared_bytes, number("group_segment_fixed_size"))
    suffixes = AMD_ACCESS.findall(text)
    row.wide_share, row.narrow = width_figures(
        [AMD_WIDTHS.get(s, 1 if "byte" in s or "8" in s else 2) for s in suffixes]
    )
    row.tensor_core = ", ".join(sorted(set(AMD_TENSOR.findall(text))))


def width_figures(widths: Sequence[int]) -> tuple[float, int]:
    """Of global accesses by their bytes a lane: the share of bytes moved 16 or more at a time; how many are not."""
    wide = sum(w for w in widths if w >= 16)
    return wide / sum(widths) if widths else 1.0, sum(w < 16 for w in widths)


def occupancy(target: Target, registers: int, warps: int, shared: int) -> float:
    """Share of the warps that a core holds which can be in flight."""
    by_registers = 512 // (-(-max(registers, 1) // 8) * 8)
    resident = 4 * min(target.warps_a_partition, by_registers)
    by_shared = target.shared_a_core // max(1, shared + target.shared_reserved)
    # a block of one wave needs no barrier, which is what limits the blocks of a CU
    by_blocks = resident if target.gpu.backend == "hip" and warps == 1 else target.blocks_a_core
    return min(resident // warps, by_shared, by_blocks) * warps / (4 * target.warps_a_partition)


def broken_rules(row: Row, target: Target, *, tensor_core: bool | str = False, wide: float = 0.0) -> list[str]:
    """What the module's docstring forbids, as sentences."""
    broken = []
    if row.spill_bytes:
        broken.append(f"spills {row.spill_bytes} bytes")
    elif row.stack_bytes:
        broken.append(f"has {row.stack_bytes} bytes of stack")
    if row.shared_bytes > target.shared_a_block:
        broken.append(f"needs {row.shared_bytes} bytes of shared memory, a block has {target.shared_a_block}")
    if row.threads > THREADS_A_BLOCK:
        broken.append(f"needs {row.threads} threads, a block has at most {THREADS_A_BLOCK}")
    wanted = target.native_tensor_core if tensor_core == "native" else r"\w"
    if tensor_core and not re.search(wanted, row.tensor_core):
        broken.append(f"uses {row.tensor_core or 'no tensor core'}, expected {tensor_core}: {wanted}")
    if row.wide_share < wide:
        share = f"{row.wide_share:.0%} of the bytes by accesses of 16 bytes a lane, expected {wide:.0%}"
        broken.append(f"moves {share}: {row.narrow} accesses are narrower")
    return broken + row.advisories


def _work(variant: Variant, target: Target, save: Path | None, log: str, pipe: Any) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        rows = compile_variant(variant, target, save)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        rows = [
            Row(variant.name, target.name, broken=[f"failed: {type(error).__name__}: {lines[0]} {lines[-1]}"[:400]])
        ]
    pipe.send(rows)


def report(
    variants: Sequence[Variant],
    targets: Sequence[Target],
    *,
    workers: int = 2,
    timeout: float = 120.0,
    save: Path | None = None,
) -> list[Row]:
    """Compile each variant for each target, each in a forked process; rows in the order of the arguments."""
    # forked, a worker has torch, Triton and the operators loaded, and any closure can be a variant. Nothing was
    # compiled here, so the compiler has no threads yet. What each worker would load or compute again is done before:
    # the hash of Triton's files, and sympy, which the first `torch.autograd.grad` imports.
    triton_key()
    importlib.import_module("torch.fx.experimental.symbolic_shapes")
    context = multiprocessing.get_context("fork")
    jobs = [(variant, target) for variant in variants for target in targets]
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Any, tuple[int, Any, float]] = {}
    done: dict[int, list[Row]] = {}
    with tempfile.TemporaryDirectory() as logs:
        while waiting or running:
            while waiting and len(running) < workers:
                i, (variant, target) = waiting.pop()
                receive, send = context.Pipe(duplex=False)
                arguments = (variant, target, save, f"{logs}/{i}", send)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                send.close()  # so that the pipe ends with the worker
                running[receive] = i, process, time.monotonic() + timeout
            ready = set(multiprocessing.connection.wait(list(running), timeout=0.5))
            for receive in [r for r in running if r in ready]:
                i, process, _ = running.pop(receive)
                try:
                    done[i] = receive.recv()
                    process.join()
                except EOFError:
                    process.join()
                    done[i] = [_lost(*jobs[i], f"crashed with status {process.exitcode}", Path(logs, str(i)))]
            for receive in [r for r, (_, _, stop) in running.items() if time.monotonic() > stop]:
                i, process, _ = running.pop(receive)
                process.kill()
                process.join()
                done[i] = [_lost(*jobs[i], f"ran longer than {timeout:g} s", Path(logs, str(i)))]
    return [row for i in range(len(jobs)) for row in done[i]]


def _lost(variant: Variant, target: Target, what: str, log: Path) -> Row:
    said = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in said.splitlines() if re.search(r"error|assert|fault|abort", line, re.IGNORECASE)]
    return Row(variant.name, target.name, broken=[f"{what}{': ' + lines[0][:300] if lines else ''}"])


def find_variants() -> list[Variant]:
    """The `COMPILE` lists of all bench_*.py."""
    variants: list[Variant] = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("bench_"):
            variants += getattr(importlib.import_module(f"benchmarks.{module.name}"), "COMPILE", [])
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names), f"names of variants appear twice: {sorted(names)}"
    return variants


def print_table(rows: Sequence[Row]) -> None:
    """The table, then the rules that are broken."""
    header = ["target", "variant", "kernel", "warps", "registers", "spill", "stack", "shared"]
    header += ["occupancy", "16 B", "narrow", "tensor", "tile"]
    lines = []
    for r in rows:
        sizes = [r.warps, r.registers, r.spill_bytes, r.stack_bytes, r.shared_bytes]
        access = [f"{r.occupancy:.0%}", f"{r.wide_share:.0%}", str(r.narrow)]
        figures = [*map(str, sizes), *access] if r.kernel else [""] * 8
        lines.append([r.target, r.variant, r.kernel or "-", *figures, r.tensor_core, r.tile])
    print(table(header, lines))
    broken = [(r, rule) for r in rows for rule in r.broken]
    print(f"\n{len(rows)} compiled kernels, {len(broken)} broken rules")
    for r, rule in broken:
        print(f"  {r.target} {r.variant} {r.kernel or '-'}: {rule}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the status is 1 if a rule is broken."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compile_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", help="variants whose name contains one of these")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the binaries there")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a variant on a target")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled; unset it")
    every = find_variants()
    variants = [v for v in every if not args.only or any(name in v.name for name in args.only)]
    if not variants:
        parser.error(f"--only {' '.join(args.only)}: there are {', '.join(v.name for v in every)}")
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    targets = [TARGETS[name] for name in args.target]
    rows = report(variants, targets, workers=args.workers, timeout=args.timeout, save=args.save)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows)
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
