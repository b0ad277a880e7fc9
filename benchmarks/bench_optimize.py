"""Prefill and greedy decode of a transformers model before and after `lmops.optimize(model, linear=...)`, in one run.

    python -m benchmarks.bench_optimize --model SmolLM2-135M-Instruct.Q4_1.gguf --threads 1 --clock cpu
    python -m benchmarks.bench_optimize                # random weights in SmolLM2-135M's shape

The model is a float32 Llama of transformers, with its own default attention before; --linear names what its layers
become, "float" for everything but that. Repetitions go round all models; figures are medians, and the ratio is that to
the untouched model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import lmops
from benchmarks.bench_generate import transformers_twin
from lmops.models import GPT, GPTConfig, load


def generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The tokens that follow, greedily."""
    with torch.inference_mode():
        return model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint that lmops loads; random SmolLM2-135M weights without it")
    parser.add_argument("--linear", nargs="+", default=["float", "int4"], help="of float, int4, int8, fp8, w8a8")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    now = time.perf_counter if args.clock == "wall" else time.process_time
    if args.model is None:
        torch.manual_seed(0)
        model = GPT(GPTConfig.smollm2_135m()).eval()
    else:
        model = load(args.model, dtype=torch.float32, quantized="dequantize", load_tokenizer=False)[0]
    models: dict[str, nn.Module] = {"untouched": transformers_twin(model)}
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    del model
    for kind in args.linear:
        models[kind] = copy.deepcopy(models["untouched"])
        linear = None if kind == "float" else kind
        options = {"linear": linear, "group_size": args.group_size, "skip": args.skip}
        print(f"{kind}\n{lmops.optimize(models[kind], verify=prompt, **options)}\n")

    print(f"torch {torch.__version__}, {args.threads} threads, {args.clock} clock, tokens/s, medians of {args.repeats}")
    print(f"{'':14}{'prefill':>12}{'ratio':>8}{'decode':>12}{'ratio':>8}")
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for repeat in range(args.repeats + 1):
        for name, each in models.items():
            times = []
            for new_tokens in (1, args.new_tokens + 1):
                start = now()
                generate(each, prompt, new_tokens)
                times.append(now() - start)
            if repeat:  # the first makes what is kept
                seconds[name][0].append(times[0])
                seconds[name][1].append(times[1] - times[0])
    base = [statistics.median(t) for t in seconds["untouched"]]
    for name, measured in seconds.items():
        prefill, decode = (statistics.median(t) for t in measured)
        print(
            f"{name:14}{args.prompt_tokens / prefill:12.1f}{base[0] / prefill:8.2f}"
            f"{args.new_tokens / decode:12.1f}{base[1] / decode:8.2f}"
        )


if __name__ == "__main__":
    main()
