"""`lmops generate` and `lmops doctor`: what they print, and one clear line for every mistake."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import make, write_gguf
from test_tokenizer import train
from typer.testing import CliRunner

import lmops
from lmops import cli
from lmops.engine import complete, generate
from lmops.models import load
from lmops.ops._register import OPERATORS

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of 400 tokens and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    backend = train()
    make(vocab_size=backend.get_vocab_size()).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def run(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def text_of(folder, tokens, **options):
    model, tokenizer = load(folder)
    return tokenizer.decode(generate(model, [tokens], **options)[0], skip_special_tokens=True)


def test_generate_prints_the_text_alone_and_the_speed_on_standard_error(folder):
    result = run("generate", "--model", folder, "--prompt", "def f(x):", "--max-new-tokens", 12)
    assert result.exit_code == 0
    _, tokenizer = load(folder)
    assert result.stdout == text_of(folder, tokenizer.encode("def f(x):"), max_new_tokens=12) + "\n"
    prompt_tokens = len(tokenizer.encode("def f(x):"))
    assert result.stderr.startswith(f"prefill: {prompt_tokens} tokens, ")
    assert "; decode: 11 tokens, " in result.stderr  # the prefill makes the first
    assert result.stderr.endswith(" tokens/s\n")


def test_generate_with_chat_template_temperature_and_seed(folder):
    _, tokenizer = load(folder)
    tokens = tokenizer.encode("[system]be brief[user]hello[bot]")
    options = ("--chat", "--system", "be brief", "--temperature", 0.8, "--max-new-tokens", 10)
    first = run("generate", "--model", folder, "--prompt", "hello", *options, "--seed", 3)
    assert first.stdout == text_of(folder, tokens, max_new_tokens=10, temperature=0.8, seed=3) + "\n"
    second = run("generate", "--model", folder, "--prompt", "hello", *options, "--seed", 4)
    assert second.stdout != first.stdout


def test_generate_with_filters_penalties_and_bias(folder):
    _, tokenizer = load(folder)
    tokens = tokenizer.encode("def f(x):")
    arguments = ("generate", "--model", folder, "--prompt", "def f(x):", "--max-new-tokens", 10, "--temperature", 2)
    choices = {
        "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "seed": 3,
    }  # fmt: skip
    options = [part for name, value in choices.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run(*arguments, *options, "--logit-bias", "70=40", "--logit-bias", "71=-2.5")
    expected = text_of(folder, tokens, max_new_tokens=10, temperature=2, logit_bias={70: 40.0, 71: -2.5}, **choices)
    assert result.stdout == expected + "\n"
    assert result.stdout != run(*arguments, *options).stdout
    result = run(*arguments, "--seed", 1, "--allowed-token", 70)
    assert result.stdout == text_of(folder, tokens, max_new_tokens=10, allowed_tokens=[70]) + "\n"


def test_generate_prints_ranked_samples_with_log_probabilities(folder):
    model, tokenizer = load(folder)
    tokens = tokenizer.encode("def f(x):")
    arguments = ("generate", "--model", folder, "--prompt", "def f(x):", "--max-new-tokens", 4, "--temperature", 2)
    result = run(*arguments, "--n", 2, "--best-of", 5, "--seed", 3, "--logprobs", 1)
    (expected,) = complete(model, [tokens], max_new_tokens=4, temperature=2, n=2, best_of=5, seed=3, logprobs=1)
    assert result.exit_code == 0
    for i, completion in enumerate(expected, start=1):
        assert f"--- {i} of 2, logprob {completion.logprob:.3f}, {completion.finish_reason}\n" in result.stdout
        assert tokenizer.decode(completion.tokens, skip_special_tokens=True) in result.stdout
        for token, logprob, top in zip(
            completion.tokens, completion.token_logprobs, completion.top_logprobs, strict=True
        ):
            ((best, value),) = top.items()
            line = f"{tokenizer.decode([token])!r} {logprob:.3f} [{tokenizer.decode([best])!r} {value:.3f}]\n"
            assert line in result.stdout
    assert "decode: 15 tokens" in result.stderr  # of all five, after the first each


def test_generate_reads_standard_input_and_sets_dtype_and_threads(folder):
    before = torch.get_num_threads()
    try:
        options = ("--max-new-tokens", 5, "--dtype", "bfloat16", "--threads", 1, "--device", "cpu")
        piped = run("generate", "--model", folder, "--prompt", "-", *options, input="some text\n")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    model, tokenizer = load(folder, dtype=torch.bfloat16)
    expected = generate(model, [tokenizer.encode("some text\n")], max_new_tokens=5)[0]
    assert piped.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


# ---- mistakes -----------------------------------------------------------------------------------------------------


def assert_one_line(result, *parts):
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("lmops: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def with_config(folder, tmp_path, **changes):
    """A copy of the model with another configuration."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return tmp_path


def test_unknown_architecture(folder, tmp_path):
    model = with_config(folder, tmp_path, model_type="mamba")
    assert_one_line(run("generate", "--model", model, "--prompt", "x"), "config.json", "model_type = 'mamba'")


def test_missing_file(tmp_path):
    result = run("generate", "--model", tmp_path / "none.gguf", "--prompt", "x")
    assert_one_line(result, str(tmp_path / "none.gguf"), "no such file or folder")


def test_truncated_files(folder, tmp_path):
    model = with_config(folder, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_one_line(run("generate", "--model", model, "--prompt", "x"), str(weights), "not a whole safetensors file")
    file = tmp_path / "cut.gguf"
    write_gguf(file, make())
    file.write_bytes(file.read_bytes()[:-10])
    assert_one_line(run("generate", "--model", file, "--prompt", "x"), str(file), "cut off")


def test_wrong_shape(folder, tmp_path):
    model = with_config(folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "model.safetensors")
    result = run("generate", "--model", model, "--prompt", "x")
    assert_one_line(result, "model.safetensors", "'model.norm.weight' has shape (31,)", "needs (32,)")


def test_unsupported_gguf_type(tmp_path):
    blocks = np.zeros((96, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.TQ1_0][1]), np.uint8)
    file = tmp_path / "ternary.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    for key, value in {
        "embedding_length": 256,
        "attention.head_count": 4,
        "context_length": 8,
        "block_count": 1,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.feed_forward_length", 256)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = run("generate", "--model", file, "--prompt", "x")
    assert_one_line(result, str(file), "'token_embd.weight' has type TQ1_0", "Q4_1")


def test_a_checkpoint_without_tokenizer(tmp_path):
    make().save_pretrained(tmp_path)
    assert_one_line(run("generate", "--model", tmp_path, "--prompt", "x"), str(tmp_path), "has no tokenizer")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--prompt", "word " * 100], ["tokens", "more than the context_length of 64"]),
        (["--prompt", "x", "--max-new-tokens", "64"], ["max_new_tokens=64", "context_length of 64"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature is -1.0"]),
        (["--prompt", "x", "--temperature", "nan"], ["temperature is nan"]),
        (["--prompt", "x", "--top-p", "1.5"], ["top_p is 1.5; it must be above 0 and at most 1"]),
        (["--prompt", "x", "--top-k", "-1"], ["top_k is -1"]),
        (["--prompt", "x", "--n", "2"], ["temperature is 0.0", "greedy samples are equal"]),
        (
            ["--prompt", "x", "--n", "3", "--best-of", "2", "--temperature", "1"],
            ["best_of is 2; it must be at least n=3"],
        ),
        (["--prompt", "x", "--logit-bias", "7:1"], ["--logit-bias is '7:1'; it must be ID=VALUE"]),
        (["--prompt", "x", "--logit-bias", "100000=1"], ["logit_bias has the token id 100000"]),
        (["--prompt", "x", "--allowed-token", "100000"], ["allowed_tokens has the token id 100000"]),
        (["--prompt", "x", "--device", "abacus"], ["--device is 'abacus'", "allowed are cpu, cuda"]),
        (["--prompt", "x", "--device", "cuda:99"], ["--device is 'cuda:99'", "torch finds"]),
        (["--prompt", "x", "--dtype", "int3"], ["--dtype is 'int3'", "bfloat16"]),
        (["--prompt", "x", "--system", "be brief"], ["--system needs --chat"]),
    ],
)
def test_bad_arguments(folder, options, parts):
    assert_one_line(run("generate", "--model", folder, "--max-new-tokens", 8, *options), *parts)


def test_chat_without_a_template(folder, tmp_path):
    model = with_config(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert_one_line(run("generate", "--model", model, "--prompt", "x", "--chat"), "no chat template")


def test_missing_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    result = run("generate", "--model", folder, "--prompt", "x")
    assert_one_line(result, "'safetensors'", 'pip install "lmops[models]"')


def test_debug_raises(tmp_path):
    result = run("--debug", "generate", "--model", tmp_path / "none", "--prompt", "x")
    assert isinstance(result.exception, FileNotFoundError)


# ---- doctor and version -------------------------------------------------------------------------------------------


def test_doctor_names_versions_and_every_implementation(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("doctor")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["lmops", lmops.__version__] in lines
    assert ["torch", torch.__version__] in lines
    assert OPERATORS
    for name, operator in OPERATORS.items():
        for device in ("cpu", "cuda"):
            kind, why = operator.implementation(device)
            assert [name, device, kind, *why.split()] in lines


def test_doctor_names_the_extra_of_a_missing_package(monkeypatch):
    monkeypatch.setitem(cli.EXTRAS, "models", ("no-such-package",))
    assert 'no-such-package missing pip install "lmops[models]"' in " ".join(run("doctor").stdout.split())


def test_the_extras_are_those_of_setup_py():
    setup = ast.parse((Path(__file__).parents[1] / "setup.py").read_text())
    found = next(node.value for node in setup.body if isinstance(node, ast.Assign) and node.targets[0].id == "extras")
    declared = {
        extra: tuple(requirement.split(">")[0] for requirement in requirements)
        for extra, requirements in ast.literal_eval(found).items()
    }
    assert declared == cli.EXTRAS


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_command_as_a_process(folder, tmp_path):
    assert process("-m", "lmops", "--version").stdout == f"lmops {lmops.__version__}\n"
    wrong = process("-m", "lmops", "generate", "--model", tmp_path / "none.gguf", "--prompt", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"lmops: {tmp_path / 'none.gguf'}: no such file or folder\n"
    done = process("-m", "lmops", "generate", "--model", folder, "--prompt", "x", "--max-new-tokens", 3)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)


def test_the_command_without_the_cli_extra(tmp_path):
    script = "import sys; sys.modules['typer'] = None; import lmops.cli"
    done = process("-c", script)
    assert done.returncode == 2
    assert done.stderr == "lmops: the command line needs the package 'typer': pip install \"lmops[cli]\"\n"
