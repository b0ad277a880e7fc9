"""`python -m benchmarks NAME`: run one benchmark as a script.

python -m benchmarks softmax --csv softmax.csv --plot softmax.png
python -m benchmarks softmax --device cpu --sizes 1024 50257
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks
from benchmarks import harness

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def names() -> list[str]:
    """The benchmarks that exist: the files bench_NAME.py of this folder."""
    found = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return sorted(name.removeprefix("bench_") for name in found if name.startswith("bench_"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=f"one of: {', '.join(names())}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of those of the benchmark")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="instead of those of the benchmark")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="measure torch.compile too (default: on a GPU only)"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="to spend on the repetitions of each provider")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every result, one row a size and provider")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates by size, e.g. as .png")
    args = parser.parse_args(argv)
    if args.name not in names():
        parser.error(f"there is no benchmark {args.name!r}; there are: {', '.join(names())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'lmops[bench]'")
    for path in (args.csv, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. The status is 1 if a result of lmops was wrong or could not be had."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in names():
        script = importlib.import_module(f"benchmarks.bench_{argv[0]}")
        if not hasattr(script, "BENCHMARKS"):  # it has arguments of its own
            sys.argv = [f"python -m benchmarks {argv[0]}", *argv[1:]]
            script.main()
            return 0
    args = parse(argv)
    module = importlib.import_module(f"benchmarks.bench_{args.name}")
    if not hasattr(module, "BENCHMARKS"):
        raise SystemExit(f"{args.name} takes its own options, after its name")
    device = torch.device(args.device)
    dtypes = [DTYPES[name] for name in args.dtypes or ()]
    results = harness.run(
        module.BENCHMARKS, device, sizes=args.sizes, dtypes=dtypes, with_compile=args.compile, seconds=args.seconds
    )
    if args.csv:
        harness.write_csv(args.csv, results, device)
    if args.plot:
        harness.plot(args.plot, results)
    return int(any(r.provider == harness.OURS and not r.times for r in results))


if __name__ == "__main__":
    sys.exit(main())
