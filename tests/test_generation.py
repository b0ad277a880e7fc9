"""Generation against recomputing everything at each step, and sampling against the probabilities it claims."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lmops
import lmops.models.gpt
import lmops.reference.sampling
from lmops.cache import OutOfBlocksError, PagedKVCache
from lmops.engine import GenerationStats, SamplingParams, complete, generate, generate_stream
from lmops.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    vocab_size=97,
    context_length=40,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=32,
    d_ff=64,
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    positions="rope",
    bias=False,
)
CONFIGS = {
    "llama": CONFIG,
    "mistral": dataclasses.replace(CONFIG, attention_window=6),
    "gpt2": GPTConfig(vocab_size=97, context_length=40, n_layers=2, n_heads=4, d_model=32),
}
PROMPTS = [[3, 14, 15, 92, 65], [35], [8, 97 - 8, 79, 32, 38, 46, 26, 43, 38], [35, 35, 35]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(config: GPTConfig = CONFIG) -> GPT:
    """Random weights of a size that makes the next token depend on the whole prompt."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> GPT:
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama() -> GPT:
    return make_model()


def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ------------------------------------------------------------------------------------------------------ greedy


def test_greedy_is_the_argmax_of_a_full_recomputation(model):
    expected = [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert min(len(set(row)) for row in expected) > 3, "a model that repeats itself tests nothing"
    assert [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS] == expected
    assert generate(model, PROMPTS, max_new_tokens=20) == expected  # and no row depends on its batch mates


def greedy_with_contiguous_cache(model: GPT, prompts: list[list[int]], n: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    cache = model.new_cache(len(prompts), longest + n, padding)
    made = []
    with torch.no_grad():
        for _ in range(n):
            tokens = model(tokens, cache=cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
            made.append(tokens)
    return torch.cat(made, 1).tolist()


def paged_cache(model: GPT, block_size: int, n_tokens: int = 600, **options) -> PagedKVCache:
    c = model.config
    return PagedKVCache(
        -(-n_tokens // block_size), n_layers=c.n_layers, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim,
        block_size=block_size, dtype=torch.float32, window=c.attention_window, **options,
    )  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 16, 17, 64])
def test_greedy_is_the_same_through_every_cache(model, block_size):
    """Pages of any size, the contiguous cache and no cache; the next turn of a chat finds what the first has left."""
    expected = [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert greedy_with_contiguous_cache(model, PROMPTS, 20) == expected
    cache = paged_cache(model, block_size)
    assert generate(model, PROMPTS, cache=cache, max_new_tokens=20) == expected
    turns = [prompt + new[:15] for prompt, new in zip(PROMPTS, expected, strict=True)]
    for prompts in (turns, turns[::-1]):
        wanted = [greedy_without_cache(model, prompt, 5) for prompt in prompts]
        assert generate(model, prompts, cache=cache, max_new_tokens=5) == wanted
    hits = cache.prefix.stats.tokens_found
    assert hits > 0 if block_size < 20 else hits == 0  # a prompt has no full block of 64
    cache.check_integrity()
    assert cache.allocator.n_available == cache.allocator.n_blocks


@pytest.mark.parametrize("block_size", [1, 16, 17, 64])
def test_forks_and_swaps_change_nothing(model, block_size):
    expected = [greedy_without_cache(model, prompt, 16) for prompt in PROMPTS]
    cache = paged_cache(model, block_size)
    held = [list(prompt) for prompt in PROMPTS]
    seqs = [cache.new_sequence(prompt) for prompt in PROMPTS]

    def step() -> None:
        new = [tokens[seq.n_tokens :] for tokens, seq in zip(held, seqs, strict=True)]
        batch = cache.append(seqs, [len(tokens) for tokens in new])
        logits = model(torch.tensor([[token for tokens in new for token in tokens]]), cache=batch, last_only=True)
        for tokens, token in zip(held, logits[:, -1].argmax(-1).tolist(), strict=True):
            tokens.append(token)

    with torch.no_grad():
        for i in range(16):
            step()
            if i == 3:  # each goes on twice, and its twin writes to a block of its own
                seqs += [cache.fork(seq) for seq in seqs]
                held += [list(tokens) for tokens in held]
            if i == 7:  # somebody else needs the memory
                swapped = [cache.swap_out(seq) for seq in seqs]
                other = cache.new_sequence()
                batch = cache.append([other], [40])
                for layer in range(model.config.n_layers):
                    shape = (40, model.config.n_kv_heads, model.config.head_dim)
                    lmops.store_kv(
                        torch.full(shape, 9.0), torch.full(shape, 9.0), batch.layers[layer], batch.slot_mapping
                    )
                seqs[:] = [cache.swap_in(one) for one in swapped]
    assert [tokens[len(p) :] for tokens, p in zip(held, PROMPTS * 2, strict=True)] == expected * 2


def test_samples_share_the_blocks_of_a_prompt(llama):
    """Eight samples of a long prompt fit where eight copies of it would not, and all blocks come back."""
    cache = paged_cache(llama, 4, n_tokens=60)
    drawn = generate(llama, [list(range(30))], cache=cache, max_new_tokens=3, n=8, temperature=1.0, seed=0)
    assert drawn == generate(llama, [list(range(30))], max_new_tokens=3, n=8, temperature=1.0, seed=0)
    cache.check_integrity()
    with pytest.raises(OutOfBlocksError, match="15 are available"):
        generate(llama, [list(range(30)), list(range(40, 70))], cache=cache, max_new_tokens=3)
    cache.check_integrity()
    assert cache.allocator.n_available == 15


def test_a_stopped_row_leaves_the_batch_and_its_blocks(llama):
    full = generate(llama, PROMPTS, max_new_tokens=8)
    cache = paged_cache(llama, 4)
    shapes: list[int] = []
    hook = llama.embed.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    stop = [full[0][2]]
    made = generate(llama, PROMPTS, cache=cache, max_new_tokens=8, stop_tokens=stop)
    hook.remove()
    assert made == [row[: row.index(stop[0])] if stop[0] in row else row for row in full]
    assert shapes[-1] < 4
    stream = generate_stream(llama, PROMPTS, cache=cache, max_new_tokens=8)
    next(stream)
    stream.close()
    assert cache.allocator.n_available == cache.allocator.n_blocks


def test_a_cache_of_another_model(llama):
    cache = PagedKVCache(4, n_layers=2, n_kv_heads=3, head_dim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="the cache has another geometry than the model"):
        generate(llama, [[1, 2]], cache=cache, max_new_tokens=2)
    assert cache.allocator.n_available == 4
    batch = paged_cache(llama, 4).append([], [])
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 1\); the batch has \(1, 0\)"):
        llama(torch.zeros(2, 1, dtype=torch.long), cache=batch)


def test_a_tensor_of_prompts(llama):
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate(llama, prompts, max_new_tokens=7) == generate(llama, prompts.tolist(), max_new_tokens=7)


def test_the_context_can_be_filled_to_its_end(model):
    prompt = PROMPTS[0]
    n = model.config.context_length - len(prompt)
    assert generate(model, [prompt], max_new_tokens=n)[0] == greedy_without_cache(model, prompt, n)


def test_generation_computes_only_the_logits_it_uses(llama):
    shapes: list[tuple[int, ...]] = []
    hook = llama.head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    generate(llama, PROMPTS, max_new_tokens=3)
    hook.remove()
    assert shapes == [(4, 1, 97)] * 3


def test_no_mask_for_sequences_of_equal_length(llama, monkeypatch):
    masks: list[Tensor | None] = []
    attention = lmops.models.gpt.attention
    monkeypatch.setattr(
        lmops.models.gpt, "attention", lambda *a, bias, **k: masks.append(bias) or attention(*a, bias=bias, **k)
    )
    for padding in (None, [0, 1]):
        cache = llama.new_cache(2, 8, padding)
        with torch.no_grad():
            llama(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
            llama(torch.tensor([[7], [8]]), cache=cache)
        assert len(masks) == 2 * CONFIG.n_layers
        assert all((mask is None) == (padding is None) for mask in masks)
        masks.clear()


# ----------------------------------------------------------------------------------------------- stop, streaming


def test_stop_tokens_end_a_row_and_are_left_out(model):
    full = generate(model, PROMPTS, max_new_tokens=20)
    stops = {full[0][4], full[2][9]}

    def until_stop(row: list[int]) -> list[int]:
        return row[: next((i for i, token in enumerate(row) if token in stops), None)]

    expected = [until_stop(row) for row in full]
    assert len({len(row) for row in expected}) > 1
    assert generate(model, PROMPTS, max_new_tokens=20, stop_tokens=stops) == expected
    assert generate(model, PROMPTS, max_new_tokens=20, stop_tokens=list(stops)) == expected


def test_the_loop_ends_with_the_last_row(llama):
    full = generate(llama, PROMPTS[:2], max_new_tokens=20)
    stops = [full[0][3], full[1][5]]
    calls: list[int] = []
    hook = llama.register_forward_hook(lambda *_: calls.append(1))
    rows = generate(llama, PROMPTS[:2], max_new_tokens=20, stop_tokens=stops)
    hook.remove()
    assert len(calls) == max(map(len, rows)) + 1 < 20


def test_a_first_token_that_stops_gives_nothing(llama):
    first = generate(llama, [PROMPTS[0]], max_new_tokens=1)[0][0]
    assert generate(llama, [PROMPTS[0]], max_new_tokens=5, stop_tokens=[first]) == [[]]


def test_the_stream_is_generate_one_step_at_a_time(llama):
    full = generate(llama, PROMPTS, max_new_tokens=8)
    stops = [full[0][2]]
    steps = list(generate_stream(llama, PROMPTS, max_new_tokens=8, stop_tokens=stops))
    rows = generate(llama, PROMPTS, max_new_tokens=8, stop_tokens=stops)
    assert len(steps) == max(map(len, rows))
    assert [[step[i] for step in steps if step[i] is not None] for i in range(len(PROMPTS))] == rows
    assert steps[-1][0] is None
    stream = generate_stream(llama, [PROMPTS[0]], max_new_tokens=3)
    assert next(stream) == [full[0][0]]


def test_the_caller_of_a_stream_is_not_in_inference_mode(llama):
    for _ in generate_stream(llama, [PROMPTS[0]], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_statistics(llama):
    stats = GenerationStats()
    full = generate(llama, PROMPTS, max_new_tokens=6, stats=stats)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.decode_tokens == 5 * len(PROMPTS)  # the first of each row comes with the prefill
    assert stats.prefill_tokens_per_second == stats.prompt_tokens / stats.prefill_seconds > 0
    assert stats.decode_tokens_per_second == stats.decode_tokens / stats.decode_seconds > 0

    stats = GenerationStats()
    assert stats.prefill_tokens_per_second == stats.decode_tokens_per_second == 0
    stops = [full[0][3]]
    rows = generate(llama, PROMPTS[:1], max_new_tokens=6, stop_tokens=stops, stats=stats)
    assert len(rows[0]) < 6
    assert stats.decode_tokens == len(rows[0])  # with the stop token, without the first


# ---------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_with_temperature(llama, temperature):
    n = 4000
    rows = generate(llama, [PROMPTS[0]] * n, max_new_tokens=1, temperature=temperature, seed=0)
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=97)
    with torch.no_grad():
        logits = llama(torch.tensor([PROMPTS[0]]))[0, -1].double()

    def fits(temperature: float) -> bool:
        """Pearson's chi-squared within 4 standard deviations; tokens expected under 5 times count as one."""
        expected = n * (logits / temperature).softmax(-1)
        rare = expected < 5
        assert (~rare).sum() >= 3
        observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None] + 1e-9))
        freedom = len(expected) - 1
        return ((observed - expected) ** 2 / expected).sum().item() < freedom + 4 * math.sqrt(2 * freedom)

    assert fits(temperature)
    assert not fits(temperature * 1.5)


def test_a_small_temperature_is_greedy(llama):
    greedy = generate(llama, PROMPTS, max_new_tokens=10)
    assert generate(llama, PROMPTS, max_new_tokens=10, temperature=1e-4, seed=0) == greedy


def test_seeds(llama):
    def draw(seed: int | None) -> list[list[int]]:
        return generate(llama, PROMPTS, max_new_tokens=10, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves torch's own state alone
    torch.manual_seed(5)
    first = draw(None)
    assert draw(None) != first
    torch.manual_seed(5)
    assert draw(None) == first


def test_bf16(llama):
    model = make_model().bfloat16()
    rows = generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, seed=0)
    assert [len(row) for row in rows] == [5] * 4
    assert rows == generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, seed=0)


def test_autocast(llama):
    """Keys come in its dtype, and so must the pages be."""
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate(llama, PROMPTS, max_new_tokens=6)
        for prompt, row in zip(PROMPTS, rows, strict=True):
            with torch.no_grad():
                logits = llama(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(-1, torch.tensor(row)[:, None])[:, 0]
            assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()  # as near as bfloat16 products are


# ----------------------------------------------------------------------------------------- parameters of sampling


def log_probabilities(model: GPT, prompt: list[int], tokens: list[int]) -> list[Tensor]:
    """The model's log-probabilities where each of `tokens` was chosen, recomputed without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]))[0].double()
    return list(logits.log_softmax(-1)[len(prompt) - 1 : -1])


def test_a_params_object_and_keywords_are_the_same(llama):
    params = SamplingParams(max_new_tokens=6, temperature=1.0, top_k=5, seed=3)
    rows = generate(llama, PROMPTS, params)
    assert rows == generate(llama, PROMPTS, max_new_tokens=6, temperature=1.0, top_k=5, seed=3)
    assert rows != generate(llama, PROMPTS, params, seed=4)


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.6}])
def test_filters_keep_the_most_probable(llama, changes):
    n = 200
    rows = generate(llama, [PROMPTS[0]] * n, max_new_tokens=1, temperature=2.0, seed=0, **changes)
    with torch.no_grad():
        logits = llama(torch.tensor([PROMPTS[0]]))[:, -1].double()
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **changes}
    kept = lmops.reference.sampling.kept(logits, torch.tensor([2.0]), *(torch.tensor([v]) for v in filters.values()))[0]
    assert 1 < kept.sum() < 50
    assert {token for (token,) in rows} <= set(kept.nonzero().flatten().tolist())
    assert len({token for (token,) in rows}) > 1


def test_samples_of_a_prompt_are_ranked(llama):
    few = complete(llama, PROMPTS[:2], max_new_tokens=4, temperature=1.5, seed=0, n=3, best_of=6, logprobs=2)
    all_of_them = complete(llama, PROMPTS[:2], max_new_tokens=4, temperature=1.5, seed=0, n=6)
    for prompt, kept, drawn in zip(PROMPTS, few, all_of_them, strict=False):
        assert [c.tokens for c in kept] == [c.tokens for c in drawn[:3]]
        assert len({tuple(c.tokens) for c in drawn}) > 3
        assert [c.logprob for c in drawn] == sorted((c.logprob for c in drawn), reverse=True)
        for completion in kept:
            expected = log_probabilities(llama, prompt, completion.tokens)
            chosen = [row[token].item() for row, token in zip(expected, completion.tokens, strict=True)]
            assert completion.token_logprobs == pytest.approx(chosen, abs=1e-3)
            assert completion.logprob == pytest.approx(sum(chosen), abs=1e-3)
            for row, top in zip(expected, completion.top_logprobs, strict=True):
                assert list(top) == row.topk(2).indices.tolist()
                assert list(top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    flat = generate(llama, PROMPTS[:2], max_new_tokens=4, temperature=1.5, seed=0, n=3, best_of=6)
    assert flat == [c.tokens for completions in few for c in completions]


def test_the_prompt_of_many_samples_is_read_once(llama):
    shapes: list[tuple[int, ...]] = []
    hook = llama.embed.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    generate(llama, PROMPTS, max_new_tokens=3, temperature=1.0, n=2, seed=0)
    hook.remove()
    assert shapes == [(1, sum(map(len, PROMPTS))), (1, 8), (1, 8)]


def test_samples_are_what_their_rows_alone_would_be(model):
    """Each sample goes on from its own tokens: its log-probabilities are those of its own sequence."""
    (completions,) = complete(model, [PROMPTS[0]], max_new_tokens=6, temperature=1.0, seed=1, n=4, logprobs=0)
    assert len({tuple(c.tokens) for c in completions}) == 4
    for completion in completions:
        expected = log_probabilities(model, PROMPTS[0], completion.tokens)
        chosen = [row[token].item() for row, token in zip(expected, completion.tokens, strict=True)]
        assert completion.token_logprobs == pytest.approx(chosen, abs=1e-3)
        assert completion.top_logprobs == [{}] * 6


def test_a_stop_token_ends_a_completion(llama):
    full = generate(llama, [PROMPTS[0]], max_new_tokens=8)[0]
    ((stopped,),) = complete(llama, [PROMPTS[0]], max_new_tokens=8, stop_tokens=[full[5]], logprobs=0)
    assert (stopped.tokens, stopped.finish_reason) == (full[:5], "stop")
    assert len(stopped.token_logprobs) == 6  # the token that stopped it is part of what happened
    ((whole,),) = complete(llama, [PROMPTS[0]], max_new_tokens=8)
    assert (whole.tokens, whole.finish_reason, whole.logprob) == (full, "length", None)


def test_a_stream_of_samples(llama):
    steps = list(generate_stream(llama, PROMPTS[:2], max_new_tokens=5, temperature=1.0, seed=2, n=2))
    assert all(len(step) == 4 for step in steps)
    rows = sorted([step[i] for step in steps] for i in range(4))
    assert rows == sorted(generate(llama, PROMPTS[:2], max_new_tokens=5, temperature=1.0, seed=2, n=2))
    with pytest.raises(ValueError, match="best_of is 3; a stream cannot rank"):
        generate_stream(llama, PROMPTS, max_new_tokens=5, temperature=1.0, n=2, best_of=3)


def test_bias_and_allowed_tokens(llama):
    assert generate(llama, [PROMPTS[0]], max_new_tokens=3, logit_bias={7: 1e4}) == [[7, 7, 7]]
    rows = generate(llama, PROMPTS, max_new_tokens=10, temperature=5.0, seed=0, allowed_tokens=[4, 90])
    assert {token for row in rows for token in row} == {4, 90}
    greedy = generate(llama, [PROMPTS[0]], max_new_tokens=1)[0][0]
    assert generate(llama, [PROMPTS[0]], max_new_tokens=1, logit_bias={greedy: -1e4})[0][0] != greedy


def test_a_bias_whatever_the_default_dtype_is(llama):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert generate(llama, [PROMPTS[0]], max_new_tokens=3, logit_bias={7: 1e4}) == [[7, 7, 7]]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_see_the_prompt_and_what_came_since(llama, name):
    """A penalty that nothing can make up for: no token comes twice, and none of the prompt's."""
    (row,) = generate(llama, [PROMPTS[0]], max_new_tokens=30, **{name: 1e4})
    assert len(set(row)) == 30
    assert not set(row) & set(PROMPTS[0])
    (favoured,) = generate(llama, [PROMPTS[0]], max_new_tokens=5, **{name: -1e4})
    assert set(favoured) <= set(PROMPTS[0])


def test_a_repetition_penalty_scales_the_logits_of_tokens_there_already(llama):
    prompt, tokens = PROMPTS[0], []
    for _ in range(10):
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + tokens]))[0, -1]
        seen = torch.tensor(sorted(set(prompt + tokens)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3, logits[seen] * 3)
        tokens.append(int(logits.argmax()))
    assert generate(llama, [prompt], max_new_tokens=10, repetition_penalty=3.0) == [tokens]
    assert tokens != generate(llama, [prompt], max_new_tokens=10)[0]


def test_logits_that_are_nan_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.head.weight[5] = math.nan
    with pytest.raises(ValueError, match="row 0 has no token to choose after 0 new ones: the model gave NaN"):
        generate(model, PROMPTS, max_new_tokens=3)


def test_what_a_failing_model_computed_is_not_found_again(llama):
    """Blocks of NaN must not be what the next call takes for a prompt's beginning."""
    broken = make_model()
    with torch.no_grad():
        broken.blocks[0].mlp.up.weight[5] = math.nan
    cache = paged_cache(llama, 4)
    with pytest.raises(ValueError, match="the model gave NaN"):
        generate(broken, PROMPTS, cache=cache, max_new_tokens=3)
    assert generate(llama, PROMPTS, cache=cache, max_new_tokens=8) == generate(llama, PROMPTS, max_new_tokens=8)
    assert cache.prefix.stats.tokens_found == 0


def test_a_cache_of_16_bits_for_a_model_of_32(llama):
    """What `PagedKVCache.for_memory(n, model.config)` makes."""
    cache = PagedKVCache.for_memory(1 << 20, llama.config)
    assert cache.layers[0].k.dtype == torch.float16
    made = generate(llama, PROMPTS, cache=cache, max_new_tokens=8)
    assert [len(row) for row in made] == [8] * 4
    with torch.no_grad():  # the same tokens from logits that are as near as float16 keys allow
        for prompt, tokens in zip(PROMPTS, made, strict=True):
            logits = llama(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
            assert (logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]).max() < 0.05


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        (
            {"prompts": [[1] * 36]},
            r"prompts\[0\] has 36 tokens, which with max_new_tokens=5 are more than the context_length of 40",
        ),
        ({"prompts": [[1], [2, 97]]}, r"prompts\[1\] has the token id 97; ids go from 0 to 96"),
        ({"prompts": [[-1]]}, r"prompts\[0\] has the token id -1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be finite and at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be finite and above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf; it must be finite"),
        ({"seed": 2**70}, f"seed is {2**70}; it must be from -2\\*\\*63 to 2\\*\\*64 - 1"),
        ({"n": 0, "temperature": 1.0}, "n is 0; it must be at least 1"),
        ({"n": 2}, "temperature is 0.0; it must be above 0 for n or best_of above 1"),
        ({"n": 2, "best_of": 1, "temperature": 1.0}, "best_of is 1; it must be at least n=2, or None"),
        ({"logprobs": -1}, "logprobs is -1; it must be at least 0, or None"),
        ({"allowed_tokens": []}, "it must be None, or not empty"),
        ({"allowed_tokens": [97]}, "allowed_tokens has the token id 97; ids go from 0 to 96"),
        ({"logit_bias": {-1: 0.5}}, "logit_bias has the token id -1"),
    ],
)
@pytest.mark.parametrize("function", [generate, generate_stream])
def test_arguments_without_meaning_are_refused(llama, function, arguments, message):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        function(llama, **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 2.5), ("top_k", 2.5), ("n", 2.0), ("best_of", "3"), ("logprobs", 1.0), ("seed", 0.5),
        ("stop_tokens", 3), ("stop_tokens", [0.5]), ("allowed_tokens", "ab"),
    ],
)  # fmt: skip
def test_parameters_that_are_not_integers_are_refused(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be "):
        SamplingParams(**{"temperature": 1.0, name: value})


def test_integers_in_arrays_and_tensors(llama):
    """A token of a tensor is not equal to a token in a set."""
    (full,) = generate(llama, [PROMPTS[0]], max_new_tokens=8)
    for kind in (np.array, torch.tensor, lambda ids: [torch.tensor(i) for i in ids]):
        cut = generate(llama, [kind(PROMPTS[0])], max_new_tokens=8, stop_tokens=kind([full[3]]))
        assert cut == [full[: full.index(full[3])]]
        assert SamplingParams(allowed_tokens=kind([3, 4])).allowed_tokens == (3, 4)


@pytest.mark.parametrize("prompts", [["ab"], [[0.5]], torch.tensor([[1.0]])])
def test_prompts_that_are_not_integers_are_refused(llama, prompts):
    with pytest.raises(
        TypeError, match=r"prompts\[0\] is .*; prompts must be a list of token lists or a \(B, T\) tensor"
    ):
        generate(llama, prompts, max_new_tokens=1)


@pytest.mark.parametrize("prompts", [[1, 2, 3], torch.tensor([1, 2, 3])])
def test_a_prompt_that_is_not_in_a_list_is_refused(llama, prompts):
    with pytest.raises(
        TypeError, match=r"prompts\[0\] is 1; prompts must be a list of token lists or a \(B, T\) tensor"
    ):
        generate(llama, prompts, max_new_tokens=1)


def test_dropout_in_generation_is_refused():
    model = make_model(dataclasses.replace(CONFIG, dropout=0.1)).train()
    with pytest.raises(ValueError, match="model is in training mode with dropout="):
        generate(model, PROMPTS, max_new_tokens=1)
    assert len(generate(model.eval(), PROMPTS, max_new_tokens=1)) == 4
