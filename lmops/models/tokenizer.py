"""Text to tokens and back: one `Tokenizer` over the `tokenizers` package, from any of the usual files.

Sources: a Hugging Face folder with tokenizer.json, GPT-2's vocab.json and merges.txt, and the metadata of a GGUF file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lmops.models.checkpoint import naming
from lmops.models.extras import require
from lmops.models.gguf import GGUFFile

Message = Mapping[str, Any]

# The split into words that a byte-level BPE was trained with. GGUF keeps a name for it (tokenizer.ggml.pre).
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),  # every digit is a word
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_QWEN2_WORDS,),
}
_PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm"}
_NFC = ("qwen2",)  # these bring the text to Unicode's composed form first
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word in the vocabulary is one token, whatever the merges say
_ADD_BOS = ("llama-bpe",)  # llama.cpp's default where the file doesn't say

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """Turns text into token numbers and back.

    backend: a `tokenizers.Tokenizer`; its post-processor adds the tokens that belong before and after a text.
    chat_template: a Jinja template in Hugging Face's form, or None.
    special_tokens: what a template may name: "bos_token", "eos_token", ... to the text of the token.
    stop_tokens: the tokens that end a text.
    """

    def __init__(
        self,
        backend: Any,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.stop_tokens = tuple(dict.fromkeys(stop_tokens))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included. A model may have more rows than this."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text`. Special tokens written out in it are recognised, as Hugging Face's tokenizers do.

        add_special_tokens: also add what the model expects around a text, such as a first "<s>".
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `tokens`. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: str | Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The tokens of a conversation as the model was trained to read it.

        messages: [{"role": "user", "content": "..."}, ...], or the text of one user message.
        add_generation_prompt: end with what opens the answer.
        variables: further names for the template, such as `tools` or `enable_thinking`.

        Raises ValueError where there is no chat template and where the template refuses the messages.
        """
        return self.encode(
            self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables),
            add_special_tokens=False,  # the template writes them
        )

    def render_chat(
        self, messages: str | Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text whose tokens `chat` returns."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use encode() and a plain prompt")
        jinja2 = require("jinja2", "models")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        values = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            template = _template_environment().from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template failed: {error}") from error

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Decodes tokens as they come and gives only whole characters.

    The pieces joined equal `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []  # the last printed token or two for their effect on spaces, then the unprinted
        self._printed = 0  # how many of them are printed

    def push(self, token: int) -> str:
        """Take one token and return the text that is now certain, "" inside a character."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """Return what is left, with U+FFFD for a character that never became whole."""
        return self._advance(self._decode(self._tokens))

    def _advance(self, text: str) -> str:
        new = text[len(self._decode(self._tokens[: self._printed])) :]
        del self._tokens[: self._printed]
        self._printed = len(self._tokens)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


def _template_environment() -> Any:
    """The Jinja environment that Hugging Face's chat templates are written for, in a sandbox."""
    jinja2 = require("jinja2", "models")
    extensions = require("jinja2.ext", "models")
    sandbox = require("jinja2.sandbox", "models")

    class Generation(extensions.Extension):  # type: ignore[name-defined]
        """{% generation %} marks the model's own text for training; here its content is printed as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


# ---- Hugging Face folders -----------------------------------------------------------------------------------------

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_from_folder(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None where it has none.

    Reads tokenizer.json, else vocab.json and merges.txt (GPT-2's); tokenizer_config.json, chat_template.jinja,
    and generation_config.json, else config.json, for the tokens that end a text.

    Raises CheckpointError for a damaged file, NotImplementedError for a tokenizer kept in another form only.
    """
    folder = Path(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        backend = _read_backend(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        if settings.get("add_prefix_space"):
            raise NotImplementedError(f"{folder}: add_prefix_space without a tokenizer.json is not supported")
        backend = _gpt2_backend(folder)
    elif (folder / "tokenizer.model").exists():
        raise NotImplementedError(
            f"{folder / 'tokenizer.model'}: SentencePiece files are not read; add a tokenizer.json"
        )
    else:
        return None
    special = {name: _token_text(settings[name]) for name in _SPECIAL_NAMES if settings.get(name) is not None}
    if "add_bos_token" in settings or "add_eos_token" in settings:
        _surround(
            backend,
            special.get("bos_token") if settings.get("add_bos_token") else None,
            special.get("eos_token") if settings.get("add_eos_token") else None,
        )
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return Tokenizer(
        backend,
        chat_template=_chat_template(folder, settings),
        special_tokens=special,
        stop_tokens=[*_configured_stop_tokens(folder), *([] if eos is None else [eos])],
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with naming(path, "not valid JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def _read_backend(path: Path) -> Any:
    tokenizers = require("tokenizers", "models")
    with naming(path, "not a tokenizer"):
        return tokenizers.Tokenizer.from_file(str(path))


def _gpt2_backend(folder: Path) -> Any:
    vocabulary = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [
        (left, right) for left, _, right in (line.partition(" ") for line in lines) if right and left != "#version:"
    ]
    backend = _byte_level_bpe(vocabulary, merges, (_GPT2_WORDS,))
    special = "<|endoftext|>"
    if special in vocabulary:
        backend.add_special_tokens([special])
    return backend


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _configured_stop_tokens(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer | None:
    """The tokenizer in the metadata of a GGUF file, None where it has none.

    Facts: llama.cpp's tokenizer.ggml.* keys. Byte-level BPE (model "gpt2") with the pre-tokenizers of GPT-2, SmolLM,
    Llama 3 and Qwen2.

    Raises CheckpointError for damaged metadata, and NotImplementedError for another model or pre-tokenizer: a guess
    would give wrong tokens without a sign.
    """
    data = file.metadata
    kind = data.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    if kind != "gpt2":
        raise NotImplementedError(f"{file.path}: tokenizer.ggml.model = {kind!r} is not supported (only 'gpt2' is)")
    pre = _pre_tokenizer(file)
    with naming(file.path, "the tokenizer in the metadata is damaged"):
        return _bpe_from_metadata(data, pre)


def _bpe_from_metadata(data: Mapping[str, Any], pre: str) -> Tokenizer:
    tokens: list[str] = data["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in data["tokenizer.ggml.merges"])]
    backend = _byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        merges,
        _PRE_TOKENIZERS[pre],
        nfc=pre in _NFC,
        ignore_merges=pre in _WHOLE_WORDS_FIRST,
    )
    _add_marked_tokens(backend, tokens, data.get("tokenizer.ggml.token_type", []))

    def named(name: str) -> str | None:
        number = data.get(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else tokens[number]

    add_bos = data.get("tokenizer.ggml.add_bos_token", pre in _ADD_BOS)
    add_eos = data.get("tokenizer.ggml.add_eos_token", False)
    _surround(backend, named("bos") if add_bos else None, named("eos") if add_eos else None)
    special = {"bos_token": named("bos"), "eos_token": named("eos"), "pad_token": named("padding")}
    stops = [data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend,
        chat_template=data.get("tokenizer.chat_template"),
        special_tokens={name: text for name, text in special.items() if text is not None},
        stop_tokens=[stop for stop in stops if stop is not None],
    )


def _pre_tokenizer(file: GGUFFile) -> str:
    """The name of the split into words. A file without one is older than the key; GPT-2 has only one split."""
    default = "gpt-2" if file.metadata.get("general.architecture") == "gpt2" else None
    name: Any = file.metadata.get("tokenizer.ggml.pre", default)
    name = _PRE_ALIASES.get(name, name)
    if name not in _PRE_TOKENIZERS:
        known = ", ".join([*_PRE_TOKENIZERS, *_PRE_ALIASES])
        raise NotImplementedError(f"{file.path}: tokenizer.ggml.pre = {name!r} is not supported (known: {known})")
    return name


def _add_marked_tokens(backend: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Make control and user-defined tokens match as a whole in a text."""
    tokenizers = require("tokenizers", "models")
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            add = backend.add_special_tokens if special else backend.add_tokens
            add([tokenizers.AddedToken(token, special=special, normalized=False)])


# ---- both ---------------------------------------------------------------------------------------------------------


def _byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    words: Sequence[str],
    *,
    nfc: bool = False,
    ignore_merges: bool = False,
) -> Any:
    """A byte-level BPE whose text is split by each of the patterns in turn."""
    tokenizers = require("tokenizers", "models")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(dict(vocabulary), list(merges), fuse_unk=False, ignore_merges=ignore_merges)
    )
    if nfc:
        backend.normalizer = tokenizers.normalizers.NFC()
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in words]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _surround(backend: Any, first: str | None, last: str | None) -> None:
    """Make `encode` put these tokens before and after a text, instead of what it added so far."""
    tokenizers = require("tokenizers", "models")
    tokens = [(token, backend.token_to_id(token)) for token in (first, last) if token is not None]
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=list(dict(tokens).items())
    )
