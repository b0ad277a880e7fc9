"""The command line: `lmops generate`, `lmops quantize`, `lmops doctor`.

An error that a user can cause is one line on standard error and exit status 2; `lmops --debug ...` shows where it came
from.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:  # the console script imports this module: there is no other place to say it
    sys.stderr.write(f'lmops: the command line needs the package {missing.name!r}: pip install "lmops[cli]"\n')
    raise SystemExit(2) from missing

if TYPE_CHECKING:
    import torch

    from lmops.engine import GenerationStats, SamplingParams
    from lmops.models import GPT, Tokenizer

# The optional packages of each extra, for `doctor`; a test compares them with setup.py.
EXTRAS = {
    "models": ("safetensors", "tokenizers", "huggingface_hub", "gguf", "jinja2"),
    "cli": ("typer", "rich"),
    "bench": ("pytest", "pytest-benchmark", "matplotlib", "rich"),
    "hf": ("transformers", "kernels"),
    "test": ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "peft"),
}
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("rtn", "gptq", "awq", "smoothquant")


class _Group(TyperGroup):
    """Turns errors that a user can cause into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        import torch

        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `lmops ... | head`: click ends quietly
            raise
        except (ValueError, TypeError, NotImplementedError, OSError, ImportError, torch.OutOfMemoryError) as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"lmops: {message}", file=sys.stderr)
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, or those of the process, and end the process."""
    app(args=None if arguments is None else list(arguments), prog_name="lmops")


def _print_version(wanted: bool) -> None:
    if wanted:
        import lmops

        print(f"lmops {lmops.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Triton kernels for language models, and a small engine that runs on them."""


# ---- generate -----------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A GGUF file, a Hugging Face folder or a name on the hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt; needs --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens that have this much.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this probable beside the most probable one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides the logits of tokens there already.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logits of tokens there already.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for every time they are there.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=VALUE", help="Added to the logit of a token id; can be repeated.")
    ] = None,
    allowed_token: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Choose only such token ids; can be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")] = None,
    n: Annotated[int, typer.Option("--n", help="Samples to print, the most probable first.")] = 1,
    best_of: Annotated[int | None, typer.Option(help="Draw this many and print the --n most probable.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Print each token's log-probability, and so many of the most probable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is a GPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Continue a prompt. The text goes to standard output as it comes, tokens per second to standard error."""
    import torch

    from lmops.engine import GenerationStats, SamplingParams
    from lmops.models import load

    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty")
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    network, tokenizer = load(model, dtype=torch_dtype, device=torch_device)
    if tokenizer is None:
        raise ValueError(f"{model}: the checkpoint has no tokenizer, which text needs")
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
    tokens = tokenizer.chat(messages) if chat else tokenizer.encode(text)
    params = SamplingParams(
        max_new_tokens=max_new_tokens, stop_tokens=tokenizer.stop_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, logit_bias=_logit_bias(logit_bias or []),
        allowed_tokens=allowed_token or None, seed=seed, n=n, best_of=best_of, logprobs=logprobs,
    )  # fmt: skip
    stats = GenerationStats()
    if params.samples == 1 and logprobs is None:
        for piece in _pieces(network, tokenizer, tokens, params, stats):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        _print_completions(network, tokenizer, tokens, params, stats)
    sys.stdout.flush()
    print(
        f"prefill: {stats.prompt_tokens} tokens, {stats.prefill_tokens_per_second:.1f} tokens/s; "
        f"decode: {stats.decode_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )


def _pieces(
    model: GPT, tokenizer: Tokenizer, tokens: list[int], params: SamplingParams, stats: GenerationStats
) -> Iterator[str]:
    """The new text, in pieces that are whole characters."""
    from lmops.engine import generate_stream

    decoder = tokenizer.stream()
    for (token,) in generate_stream(model, [tokens], params, stats=stats):
        if token is not None:
            yield decoder.push(token)
    yield decoder.finish()


def _print_completions(
    model: GPT, tokenizer: Tokenizer, tokens: list[int], params: SamplingParams, stats: GenerationStats
) -> None:
    """Several texts, or one with its log-probabilities: a line before each has its number and the sum of them."""
    from lmops.engine import complete

    (completions,) = complete(model, [tokens], params, stats=stats)
    for i, completion in enumerate(completions, start=1):
        print(f"--- {i} of {len(completions)}, logprob {completion.logprob:.3f}, {completion.finish_reason}")
        print(tokenizer.decode(completion.tokens, skip_special_tokens=True))
        if completion.token_logprobs is None:
            continue
        for token, logprob, top in zip(
            completion.tokens, completion.token_logprobs, completion.top_logprobs or [], strict=False
        ):
            others = ", ".join(f"{tokenizer.decode([other])!r} {value:.3f}" for other, value in top.items())
            print(f"{tokenizer.decode([token])!r} {logprob:.3f}" + (f" [{others}]" if others else ""))


def _logit_bias(pairs: list[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise ValueError(f"--logit-bias is {pair!r}; it must be ID=VALUE, such as 50256=-100") from None
    return biases


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; allowed are {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device(name: str | None) -> torch.device:
    import torch

    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; allowed are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"--device is {name!r}; torch finds {gpus} GPUs")
    return device


# ---- quantize -----------------------------------------------------------------------------------------------------


@app.command()
def quantize(
    model: Annotated[str, typer.Option(help="A GGUF file, a Hugging Face folder or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="The folder to write, which must not be there yet.")],
    bits: Annotated[int | None, typer.Option(help="Of a weight: 4 or 8. 4, for smoothquant 8.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 16 to 1024, or -1 for a row. 128, for smoothquant -1."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="rtn rounds to nearest; gptq and awq, and smoothquant, where products are of 8 bits on both sides,"
            " need --calibration."
        ),
    ] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="A text like those that the model will read.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Read so many tokens of it.", min=1)] = 16384,
    sequence: Annotated[int, typer.Option(help="Cut them into sequences of this length.", min=1)] = 512,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone; can be repeated.")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"Of what stays: {', '.join(DTYPES)}.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is a GPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Write a model with its linear layers in 4 or 8 bits to a folder that generate and lmops.load open.

    Without --skip the head stays as it is.
    """
    import torch

    from lmops.models import load, save
    from lmops.quantization import quantize_model, smooth_quantize

    if out.exists():
        raise FileExistsError(f"--out is {out}, which exists already")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out is {out}, and there is no folder {out.absolute().parent}")
    if method not in METHODS:
        raise ValueError(f"--method is {method!r}; allowed are {', '.join(METHODS)}")
    if method != "rtn" and calibration is None:
        raise ValueError(f"--method {method} needs --calibration, a text file")
    smooth = method == "smoothquant"
    if smooth and (bits not in (None, 8) or group_size not in (None, -1) or symmetric):
        raise ValueError(
            "--method smoothquant has 8 bits and a scale a row: leave out --bits, --group-size, --symmetric"
        )
    bits = bits if bits is not None else 8 if smooth else 4
    text = "" if calibration is None else _text_of(calibration)
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    network, tokenizer = load(model, dtype=torch_dtype, device=torch_device, quantized="dequantize")
    batches = None
    if method != "rtn":
        if tokenizer is None:
            raise ValueError(f"{model}: the checkpoint has no tokenizer, which --calibration needs")
        tokens = torch.tensor(tokenizer.encode(text)[:calibration_tokens])
        batches = tokens.split(min(sequence, network.config.context_length))
    left_out = skip or ("lm_head", "head")
    if smooth:
        names = smooth_quantize(network, batches or [], skip=left_out)
    else:
        group_size = 128 if group_size is None else group_size
        names = quantize_model(
            network, bits, group_size, method, calibration=batches, skip=left_out, symmetric=symmetric
        )
    save(network, tokenizer, out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {len(names)} layers in {bits} bits, {size:.1f} MB", file=sys.stderr)


def _text_of(calibration: Path) -> str:
    try:
        text = calibration.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibration is {calibration}, which is no text in UTF-8: {error}") from None
    if not text:
        raise ValueError(f"--calibration is {calibration}, which is empty")
    return text


# ---- doctor -------------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Show what is installed, and which implementation every operator uses on which device, and why."""
    console = Console()
    console.print(_environment())
    console.print(_operators())
    console.print(_packages())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _environment() -> Table:
    import torch

    import lmops

    table = _table("Environment", "", "")
    table.add_row("lmops", lmops.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", torch.__version__)
    table.add_row("triton", _triton())
    table.add_row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        table.add_row(f"cuda:{i}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB")
    if not torch.cuda.device_count():
        table.add_row("cuda", "no GPU found")
    return table


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported: {error}"
    return triton.__version__


def _memory() -> str:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not set(names) <= set(getattr(os, "sysconf_names", ())):
        return "memory unknown"
    page, pages = (os.sysconf(name) for name in names)
    return f"{page * pages / 2**30:.1f} GiB memory"


def _operators() -> Table:
    import lmops.ops  # noqa: F401  (registers them)
    from lmops.ops._register import OPERATORS

    table = _table("Operators", "operator", "device", "implementation", "why")
    for name, operator in sorted(OPERATORS.items()):
        for device in ("cpu", "cuda"):
            kind, why = operator.implementation(device)
            table.add_row(name, device, kind, why)
    return table


def _packages() -> Table:
    table = _table("Optional packages", "package", "version", "install with")
    extras: dict[str, list[str]] = {}
    for extra, packages in EXTRAS.items():
        for package in packages:
            extras.setdefault(package, []).append(extra)
    for package, names in extras.items():
        try:
            table.add_row(package, version(package), "")
        except PackageNotFoundError:
            # markup would take [models] for a style
            table.add_row(package, "missing", f'pip install "lmops\\[{names[0]}]"')
    return table
