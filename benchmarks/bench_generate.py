"""Prefill and greedy decode of `lmops.generate` and of transformers' `generate`, on the same fp32 weights in one run.

    python -m benchmarks.bench_generate --model SmolLM2-135M-Instruct.Q4_1.gguf --threads 1 2
    python -m benchmarks.bench_generate                # random weights in SmolLM2-135M's shape

Both models produce the same greedy tokens, or no time is printed. Repetitions alternate between the two, so that a
machine that slows down slows both; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from lmops.engine.generation import generate
from lmops.models import GPT, GPTConfig, load
from lmops.models.gpt import Block


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
    name = "lmops"

    def __init__(self, model: GPT) -> None:
        self.model = model

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


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def load_model(path: str | None) -> GPT:
    if path is None:
        torch.manual_seed(0)
        return GPT(GPTConfig.smollm2_135m()).eval()
    return load(path, dtype=torch.float32, load_tokenizer=False)[0]


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
    args = parser.parse_args()

    model = load_model(args.model)
    engines: list[Ours | Transformers] = [Ours(model), Transformers(model)]
    draw = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, fp32, tokens/s, medians of {args.repeats}")
    print(f"{'':24}{'threads':>8}{'batch':>6}{'lmops':>10}{'transformers':>14}{'ratio':>7}")

    def row(what: str, threads: int, prompts: list[list[int]], tokens: int, measure: Callable) -> None:
        times: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for _ in range(args.repeats):
            for engine in engines:
                times[engine.name].append(measure(engine, prompts))
        ours, theirs = (len(prompts) * tokens / statistics.median(times[engine.name]) for engine in engines)
        print(f"{what:24}{threads:8}{len(prompts):6}{ours:10.1f}{theirs:14.1f}{ours / theirs:7.2f}", flush=True)

    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batch:
            long = torch.randint(model.config.vocab_size, (batch, args.prompt_tokens), generator=draw).tolist()
            short = [prompt[:8] for prompt in long]
            for prompts in (long, short):
                found = [engine(prompts, 16) for engine in engines]
                if found[0] != found[1]:
                    raise SystemExit(f"greedy tokens differ: {found[0]} of lmops, {found[1]} of transformers")

            def prefill(engine, prompts):
                return seconds(lambda: engine(prompts, 1))

            def decode(engine, prompts):  # without the prompt's own step
                return seconds(lambda: engine(prompts, args.new_tokens + 1)) - seconds(lambda: engine(prompts, 1))

            row(f"prefill {args.prompt_tokens}", threads, long, args.prompt_tokens, prefill)
            row(f"decode {args.new_tokens}", threads, short, args.new_tokens, decode)
            row(f"decode {args.new_tokens} after {args.prompt_tokens}", threads, long, args.new_tokens, decode)


if __name__ == "__main__":
    main()
