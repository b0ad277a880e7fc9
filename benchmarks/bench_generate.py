"""Prefill and greedy decode of `lmops.generate`, transformers' `generate` and llama.cpp on one checkpoint in one run.

    python -m benchmarks.bench_generate --model SmolLM2-135M-Instruct.Q4_1.gguf --threads 1 --batch 1 8 --clock cpu
    python -m benchmarks.bench_generate                # random weights in SmolLM2-135M's shape

Engines: lmops with the weights as the checkpoint has them, lmops and transformers with the same weights in float32, and
llama.cpp where the checkpoint is a GGUF file and llama-cpp-python is installed. In float32 the greedy tokens of lmops
and transformers are equal, or no time is printed. Repetitions go round all engines, so that a machine that slows down
slows all; figures are medians. `--clock cpu` counts the process's own seconds of a core, which on one thread leaves out
what other programs took.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from lmops.engine.generation import generate
from lmops.models import GPT, GPTConfig, load
from lmops.models.gpt import Block
from lmops.quantization import QuantLinear


def transformers_twin(model: GPT) -> torch.nn.Module:
    """A transformers Llama with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    llama_like = c.norm == "rmsnorm" and c.gated_mlp and c.activation == "silu" and c.positions == "rope"
    if not llama_like or c.bias or c.qkv_bias or c.qk_norm or c.rope_scaling or c.attention_window:
        raise NotImplementedError(f"the benchmark compares plain Llama models only; the model's configuration is {c}")
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.context_length,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        heads = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim)
        q, k, v = block.attn.qkv.weight.split(heads)
        gate, up = block.mlp.up.weight.chunk(2)
        layer = {
            "input_layernorm": block.attn_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.out.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.down.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    twin = LlamaForCausalLM(config).eval()
    twin.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return twin


class Ours:
    name = "lmops fp32"

    def __init__(self, model: GPT, name: str = name) -> None:
        self.model = model
        self.name = name

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generate(self.model, prompts, max_new_tokens=new_tokens)


class Transformers:
    name = "transformers"

    def __init__(self, model: GPT) -> None:
        self.model = transformers_twin(model)

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            result = self.model.generate(  # type: ignore[operator]
                tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return result[:, tokens.shape[1] :].tolist()


class LlamaCpp:
    """llama.cpp through its C interface, which has batches: sequence i of a batch is prompt i."""

    name = "llama.cpp"

    def __init__(self, path: str, threads: int, batch: int, tokens: int) -> None:
        import llama_cpp

        self.c = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = tokens * batch, tokens * batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _step(self, tokens: list[list[int]], start: int) -> list[int]:
        """Feed tokens of every sequence, the same number each, and choose the next one of each."""
        import numpy as np

        n = len(tokens[0])
        batch = self.c.llama_batch_init(n * len(tokens), 0, 1)
        batch.n_tokens = n * len(tokens)
        for row, new in enumerate(tokens):
            for i, token in enumerate(new):
                at = row * n + i
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, start + i, 1
                batch.seq_id[at][0], batch.logits[at] = row, i == n - 1
        assert self.c.llama_decode(self.context, batch) == 0
        logits = [self.c.llama_get_logits_ith(self.context, row * n + n - 1) for row in range(len(tokens))]
        chosen = [int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in logits]
        self.c.llama_batch_free(batch)
        return chosen

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        steps = [self._step(prompts, 0)]
        for i in range(new_tokens - 1):
            steps.append(self._step([[token] for token in steps[-1]], len(prompts[0]) + i))
        return [list(row) for row in zip(*steps, strict=True)]


Engine = Ours | Transformers | LlamaCpp


def load_models(path: str | None) -> list[Engine]:
    """lmops as stored, if that is quantized, lmops in float32, transformers."""
    if path is None:
        torch.manual_seed(0)
        model = GPT(GPTConfig.smollm2_135m()).eval()
        return [Ours(model), Transformers(model)]
    model = load(path, dtype=torch.float32, quantized="dequantize", load_tokenizer=False)[0]
    kept = load(path, dtype=torch.float32, load_tokenizer=False)[0]
    quantized = any(isinstance(module, QuantLinear) for module in kept.modules())
    return [*([Ours(kept, "lmops")] if quantized else []), Ours(model), Transformers(model)]


@pytest.mark.parametrize("engine", [Ours, Transformers], ids=lambda engine: engine.name)
@pytest.mark.parametrize(("what", "prompt_tokens", "new_tokens"), [("prefill", 64, 1), ("decode", 8, 16)])
def test_generate(benchmark, engine, what, prompt_tokens, new_tokens):
    """`pytest benchmarks/`: both engines on a small random model."""
    if engine is Transformers:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=4_096, context_length=128, n_layers=4, n_heads=6, n_kv_heads=2, d_model=192, d_ff=512, bias=False,
        norm="rmsnorm", activation="silu", gated_mlp=True, positions="rope", tie_embeddings=True,
    )  # fmt: skip
    model = GPT(config).eval()
    prompt = torch.randint(4_096, (prompt_tokens,)).tolist()
    run = engine(model)
    assert run([prompt], new_tokens) == Ours(model)([prompt], new_tokens)
    benchmark.group = f"{what}, {prompt_tokens} + {new_tokens} tokens"
    benchmark.pedantic(lambda: run([prompt], new_tokens), rounds=10, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint that lmops loads; random SmolLM2-135M weights without it")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prefill measurement")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the decode measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()

    now = time.perf_counter if args.clock == "wall" else time.process_time
    engines = load_models(args.model)
    config = next(engine.model.config for engine in engines if isinstance(engine, Ours))
    longest = args.prompt_tokens + args.new_tokens + 1
    llama = (args.model or "").endswith(".gguf") and importlib.util.find_spec("llama_cpp") is not None
    names = [engine.name for engine in engines] + ["llama.cpp"] * llama
    draw = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {args.clock} clock, tokens/s, medians of {args.repeats}")
    print(f"{'':24}{'threads':>8}{'batch':>6}" + "".join(f"{name:>14}" for name in names))

    def seconds(call: Callable[[], object]) -> float:
        start = now()
        call()
        return now() - start

    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            running = [*engines, *([LlamaCpp(args.model, threads, batch, longest)] if llama else [])]
            long = torch.randint(config.vocab_size, (batch, args.prompt_tokens), generator=draw).tolist()
            short = [prompt[:8] for prompt in long]

            def row(what: str, prompts: list[list[int]], tokens: int, measure: Callable, running=running) -> None:
                found = {engine.name: engine(prompts, 16) for engine in running}
                if found["lmops fp32"] != found["transformers"]:
                    raise SystemExit(f"greedy tokens differ: {found}")
                times: dict[str, list[float]] = {engine.name: [] for engine in running}
                for _ in range(args.repeats):
                    for engine in running:
                        times[engine.name].append(measure(engine, prompts))
                speeds = [len(prompts) * tokens / statistics.median(times[engine.name]) for engine in running]
                print(
                    f"{what:24}{torch.get_num_threads():8}{len(prompts):6}" + "".join(f"{v:14.1f}" for v in speeds),
                    flush=True,
                )

            def prefill(engine, prompts):
                return seconds(lambda: engine(prompts, 1))

            def decode(engine, prompts):  # without the prompt's own step
                return seconds(lambda: engine(prompts, args.new_tokens + 1)) - seconds(lambda: engine(prompts, 1))

            row(f"prefill {args.prompt_tokens}", long, args.prompt_tokens, prefill)
            row(f"decode {args.new_tokens}", short, args.new_tokens, decode)
            row(f"decode {args.new_tokens} after {args.prompt_tokens}", long, args.new_tokens, decode)


if __name__ == "__main__":
    main()
