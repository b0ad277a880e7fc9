"""PagedKVCache: what a batch says, where things lie in memory, copies, windows, swapping, memory, and every refusal."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lmops
from lmops.cache import OutOfBlocksError, PagedKVCache
from lmops.ops._register import OPERATORS
from lmops.ops.paged_cache import store_kv
from lmops.reference.paged_cache import dequantize_rows, quantize_rows

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FORMATS = ("native", "int8", "fp8", "int4")


def new_cache(n_blocks=8, *, block_size=4, n_layers=2, n_kv_heads=2, head_dim=8, **how):
    cache = PagedKVCache(
        n_blocks, block_size=block_size, n_layers=n_layers, n_kv_heads=n_kv_heads, head_dim=head_dim, **how
    )
    for t in tensors(cache.pages):  # known bits, so that they can be compared
        t.zero_() if t.dtype != torch.float8_e4m3fn else t.view(torch.uint8).zero_()
    return cache


def tensors(pages):
    return [t for t in (pages.k, pages.v, pages.k_scale, pages.v_scale) if t is not None]


def everything(cache):
    a = cache.allocator
    state = [(sorted(map(id, a._sequences))), list(a._refs), list(a._cached), dict(a._key_of), dict(a._free._end_of)]
    tables = sorted((id(seq), seq.n_tokens, seq.n_released, *seq.blocks) for seq in a._sequences)
    return state, tables, [t.cpu().contiguous().view(torch.uint8).clone() for t in tensors(cache.pages)]


def assert_unchanged(cache, before):
    after = everything(cache)
    assert after[:2] == before[:2]
    assert all(map(torch.equal, after[2], before[2]))


def step(cache, seqs, tokens):
    """One step of a model whose keys of a token are a row of a table, in every layer another, and values minus that."""
    batch = cache.append(seqs, [len(t) for t in tokens])
    k = key_rows(cache, [t for new in tokens for t in new])
    for layer, pages in enumerate(cache.layers):
        store_kv(k[layer].to(cache.device), -k[layer].to(cache.device), pages, batch.slot_mapping)
    return batch


def key_rows(cache, tokens):
    """(layers, tokens, heads, head_dim)"""
    table = torch.randn(len(cache.layers), 100, *cache.layers[0].k.shape[2:3], cache.layers[0].head_dim,
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
    return table[:, tokens].half()


def assert_holds(cache, seq, tokens):
    """Every layer's pages have the tokens of a sequence, those released left out."""
    assert seq.n_tokens == len(tokens)
    size, first = cache.allocator.block_size, seq.n_released
    blocks, n = seq.blocks[first:], len(tokens) - first * size
    for layer, pages in enumerate(cache.layers):
        k = key_rows(cache, tokens[first * size :])[layer]
        for codes, scales, rows in ((pages.k, pages.k_scale, k), (pages.v, pages.v_scale, -k)):
            codes, scales = codes.cpu(), None if scales is None else scales.cpu()[blocks].flatten(0, 1)[:n]
            kind = codes.dtype
            codes = codes.view(torch.uint8)[blocks].view(kind) if kind == torch.float8_e4m3fn else codes[blocks]
            got = dequantize_rows(codes.flatten(0, 1)[:n], scales, FP32)
            if scales is not None:
                rows = dequantize_rows(*quantize_rows(rows, pages.format, scales.dtype), FP32)
            assert torch.equal(got, rows.float())


@pytest.mark.parametrize("format", FORMATS)
def test_write_fork_append_swap(path, format):
    """Everything that touches the tensors, through the torch implementation and the kernels."""
    cache = new_cache(12, pages=format, device=path.device)
    a, b = cache.new_sequence(), cache.new_sequence()
    tokens = {a: [1, 2, 3, 4, 5, 6], b: [7, 8, 9]}
    step(cache, [a, b], list(tokens.values()))
    c, d = cache.fork(a), cache.fork(a)
    tokens |= {c: list(tokens[a]), d: list(tokens[a])}
    for seqs, new in (([a, c, b], [[10], [11, 12, 13, 14], [15]]), ([d, a], [[16], [17, 18]])):
        step(cache, seqs, new)
        for seq, more in zip(seqs, new, strict=True):
            tokens[seq] += more
        for seq, held in tokens.items():
            assert_holds(cache, seq, held)
    swapped = cache.swap_out(c)
    held = tokens.pop(c)
    other = cache.new_sequence()
    tokens[other] = list(range(20, 40))
    step(cache, [other], [tokens[other]])
    cache.free(other)
    del tokens[other]
    for again in (cache.swap_in(swapped), cache.swap_in(swapped)):
        tokens[again] = list(held)
        step(cache, [again], [[50 + len(tokens)]])
        tokens[again].append(50 + len(tokens))
    for seq, held in tokens.items():
        assert_holds(cache, seq, held)
    cache.check_integrity()


def test_a_batch():
    cache = new_cache()
    a, b, c = (cache.new_sequence() for _ in range(3))
    cache.append([a], [5])
    batch = cache.append([b, a, c], [3, 4, 0])
    assert b.blocks != a.blocks
    assert batch.block_table.tolist() == [[*b.blocks, -1, -1], a.blocks, [-1] * 3]
    assert batch.context_lens.tolist() == [3, 9, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 7, 7]
    assert (batch.max_seqlen_q, batch.max_context) == (4, 9)
    assert batch.positions.tolist() == [0, 1, 2, 5, 6, 7, 8]
    slots = cache.allocator.slots
    assert batch.slot_mapping.tolist() == slots(b) + slots(a, 5)
    dtypes = {name: getattr(batch, name).dtype for name in ("block_table", "context_lens", "cu_seqlens_q")}
    assert set(dtypes.values()) == {torch.int32}
    assert batch.slot_mapping.dtype == batch.positions.dtype == torch.int64
    nothing = cache.append([], [])
    assert (nothing.block_table.shape, nothing.cu_seqlens_q.tolist(), nothing.max_context) == ((0, 0), [0], 0)
    assert nothing.slot_mapping.shape == (0,)


@pytest.mark.skipif(OPERATORS["paged_attention"].cpu_uses_triton, reason="tensors on the CPU are the kernel's")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_token_of_each_sequence_on_a_cpu(dtype, window):
    """What a step looks up once for all layers gives bits and pages of the operators, which look again in each."""
    cache = new_cache(24, dtype=dtype, window=window)
    seqs = [cache.new_sequence() for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for lengths in ([9, 3], [1, 1], [2, 1], [1, 1]):
            batch = cache.append(seqs, lengths)
            assert (batch.rows is None) == (max(lengths) > 1)
            for layer, pages in enumerate(cache.layers):
                q, k, v = (torch.randn(sum(lengths), n, 8, generator=draw).to(dtype) for n in (4, 2, 2))
                y = batch.attend(layer, q, k, v)
                stored = [t.clone() for t in tensors(pages)]
                assert torch.equal(replace(batch, rows=None).attend(layer, q, k, v), y)
                assert all(map(torch.equal, stored, tensors(pages)))
                options = batch.attend(layer, q, k, v, scale=0.1), batch.attend(layer, q, k, v, softcap=2.0)
                assert not any(torch.equal(other, y) for other in options)
        if window is None:
            twin = cache.fork(seqs[0])
            cache.append([twin], [1])  # in a copy of the last block
            assert twin.blocks != list(range(twin.blocks[0], twin.blocks[0] + len(twin.blocks)))
            assert cache.append([twin], [1]).rows is None


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 3, 8), (1, 2, 8), "query's heads must be a multiple of the pages' 2, got 3"),
        ((1, 4, 8), (1, 1, 8), r"k must be \(tokens, 2, 8\) for these pages, got \(1, 1, 8\)"),
        ((1, 4, 8), (1, 2, 1), r"k must be \(tokens, 2, 8\) for these pages, got \(1, 2, 1\)"),
        ((2, 4, 8), (2, 2, 8), "slot_mapping must"),
    ],
)
def test_one_token_each_is_checked_like_many(q, k, message):
    """Nothing is broadcast into the pages."""
    cache = new_cache(dtype=FP32)
    seq = cache.new_sequence()
    cache.append([seq], [3])
    batch = cache.append([seq], [1])
    before = everything(cache)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        batch.attend(0, torch.ones(q), torch.ones(k), torch.ones(k))
    if q != (1, 3, 8):  # the keys are right, and stored before there is a query
        assert_unchanged(cache, before)


def test_blocks_in_a_row_are_one_view():
    """Of a head tokens lie one after another, so that neither a page nor a run of blocks needs a gather."""
    cache = new_cache()
    pages = cache.layers[1]
    assert pages.k.shape == (8, 4, 2, 8)
    run = pages.k[2:5].movedim(2, 0).flatten(1, 2)
    assert run.shape == (2, 12, 8)
    assert run.untyped_storage().data_ptr() == cache.pages.k.untyped_storage().data_ptr()
    assert pages.k[3, :, 1].is_contiguous()
    cache.pages.k[5, 3, 2] = 1
    assert pages.k[5, 3, 0].tolist() == [1] * 8
    assert pages.k.sum() == 8
    quantized = new_cache(pages="int4")
    assert quantized.layers[0].k_scale[3, :, 1].is_contiguous()


def test_a_prompt_that_is_known_is_shared_and_not_written_again():
    cache = new_cache(16)
    prompt = list(range(1, 11))
    a = cache.new_sequence(prompt)
    step(cache, [a], [prompt])
    cache.register(a, prompt)
    b, other = cache.new_sequence([*prompt, 60]), cache.new_sequence([*prompt, 60], salt="tenant")
    assert (b.n_tokens, b.n_cached, b.blocks, other.n_tokens) == (8, 8, a.blocks[:2], 0)
    batch = step(cache, [b], [[*prompt[8:], 60]])
    assert batch.positions.tolist() == [8, 9, 10]
    assert not set(batch.slot_mapping.tolist()) & set(cache.allocator.slots(a))
    assert_holds(cache, a, prompt)
    assert_holds(cache, b, [*prompt, 60])
    assert cache.prefix.stats.tokens_found == 8
    without = new_cache(16, prefix_caching=False)
    a = without.new_sequence(prompt)
    step(without, [a], [prompt])
    without.register(a, prompt)
    assert without.new_sequence(prompt).n_tokens == 0
    assert without.prefix is None


def test_a_window_releases_what_no_later_token_sees():
    cache = new_cache(8, window=6)
    seq = cache.new_sequence()
    held = list(range(1, 12))
    batch = step(cache, [seq], [held])
    assert -1 not in batch.block_table  # the first token's query sees itself
    for token, table in ((20, [-1, 1, 2]), (21, [-1, 1, 2, 3]), (22, [-1, -1, 2, 3]), (23, [-1, -1, 2, 3])):
        held.append(token)
        batch = step(cache, [seq], [[token]])
        assert batch.block_table.tolist() == [[-1 if i < 0 else seq.blocks[j] for j, i in enumerate(table)]]
        assert [b == -1 for b in seq.blocks] == [i == -1 for i in table]
        # of the keys from position - 5 on, none was released
        assert seq.n_released * 4 <= seq.n_tokens - 1 - 5 < (seq.n_released + 1) * 4
        assert_holds(cache, seq, held)
    cache.truncate(seq, 12)
    del held[12:]
    swapped = cache.swap_out(seq)
    assert cache.allocator.n_free == 8
    again = cache.swap_in(swapped)
    assert_holds(cache, again, held)
    assert again.n_released == 2


def test_too_few_blocks_change_nothing(path):
    cache = new_cache(6, device=path.device)
    a = cache.new_sequence()
    step(cache, [a], [[1, 2, 3, 4, 5, 6]])
    b, c = cache.fork(a), cache.new_sequence()
    before = everything(cache)
    # of 4 blocks: a copy and none, 3, and 1 more
    with pytest.raises(OutOfBlocksError, match="5 blocks were asked for, 4 of 6 are available"):
        cache.append([a, b, c], [2, 5, 10])
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match="seqs must be different sequences"):
        cache.append([a, a], [1, 1])
    with pytest.raises(ValueError, match="n_tokens must have a number for each of 2 sequences, got 1"):
        cache.append([a, c], [1])
    with pytest.raises(ValueError, match="n_tokens must be at least 0, got -1"):
        cache.append([a, c], [1, -1])
    with pytest.raises(ValueError, match="seq must be a live sequence"):
        cache.append([a, new_cache().new_sequence()], [1, 1])
    assert_unchanged(cache, before)
    cache.append([a, b, c], [2, 2, 10])
    swapped = cache.swap_out(c)
    with pytest.raises(ValueError, match="seq must be a live sequence"):
        cache.swap_out(c)
    cache.append([a], [5])
    before = everything(cache)
    with pytest.raises(OutOfBlocksError, match="3 blocks were asked for, 1 of 6 are available"):
        cache.swap_in(swapped)
    assert_unchanged(cache, before)


def test_swapped_pages_of_another_cache():
    cache = new_cache()
    seq = cache.new_sequence()
    step(cache, [seq], [[1, 2, 3, 4, 5]])
    swapped = cache.swap_out(seq)
    for other in (new_cache(head_dim=16), new_cache(n_layers=3), new_cache(dtype=BF16), new_cache(pages="int8")):
        before = everything(other)
        with pytest.raises(ValueError, match="dst_pages must be like src_pages"):
            other.swap_in(swapped)
        assert_unchanged(other, before)
    with pytest.raises(ValueError, match="dst_pages must be like src_pages"):
        new_cache(block_size=8).swap_in(swapped)
    like = new_cache(20)
    assert_holds(like, like.swap_in(swapped), [1, 2, 3, 4, 5])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [HALF, FP32])
def test_memory_is_what_was_planned(format, dtype):
    config = lmops.GPTConfig(vocab_size=9, context_length=9, n_layers=3, n_heads=4, n_kv_heads=2, d_model=32)
    cache = PagedKVCache.for_memory(100_000, config, pages=format, dtype=dtype, block_size=8, value_dim=12)
    taken = sum(t.untyped_storage().nbytes() for t in tensors(cache.pages))
    block = taken // cache.allocator.n_blocks
    assert taken == cache.plan.n_bytes <= 100_000 < taken + block
    assert cache.plan.n_tokens == 8 * cache.allocator.n_blocks
    assert str(cache).startswith(f"{cache.plan.n_tokens:,} tokens fit: {cache.allocator.n_blocks:,} blocks of 8")
    pages = cache.layers[2]
    assert (len(cache.layers), pages.format, pages.n_kv_heads, pages.head_dim, pages.value_dim) == (3, format, 2, 8, 12)
    again = PagedKVCache(5, n_layers=3, n_kv_heads=2, head_dim=8, value_dim=12, block_size=8, pages=format, dtype=dtype)
    assert again.plan.n_bytes == 5 * block == again.plan.budget
    with pytest.raises(ValueError, match=f"n_bytes must be at least {block}, which a block takes, got {block - 1}"):
        PagedKVCache.for_memory(block - 1, config, pages=format, dtype=dtype, block_size=8, value_dim=12)


def test_configurations():
    ours = lmops.GPTConfig(vocab_size=9, context_length=9, n_layers=3, n_heads=4, d_model=32, attention_window=7)
    assert PagedKVCache.for_memory(100_000, ours).window == 7
    assert PagedKVCache.for_memory(100_000, ours, window=5).window == 5
    theirs = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, hidden_size=32, num_attention_heads=4)
    composed = SimpleNamespace(get_text_config=lambda: theirs)
    for config in (theirs, SimpleNamespace(**vars(theirs), head_dim=None), composed):
        pages = PagedKVCache.for_memory(100_000, config).layers
        assert (len(pages), pages[0].n_kv_heads, pages[0].head_dim) == (3, 2, 8)
    del theirs.num_key_value_heads
    assert PagedKVCache.for_memory(100_000, theirs).layers[0].n_kv_heads == 4
    with pytest.raises(ValueError, match="config must have n_layers or num_hidden_layers, got SimpleNamespace"):
        PagedKVCache.for_memory(100_000, SimpleNamespace())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_blocks": 0}, ValueError, "n_blocks must be at least 1, got 0"),
        ({"block_size": 257}, ValueError, "block_size must be 1 to 256 tokens, got 257"),
        ({"n_layers": 0}, ValueError, "n_layers must be at least 1, got 0"),
        ({"value_dim": 0}, ValueError, "value_dim must be at least 1, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16, bfloat16 or float32, got torch.int8"),
        ({"pages": "int2"}, ValueError, "pages must be one of native, int8, fp8, int4, got 'int2'"),
        ({"pages": "int4", "head_dim": 7}, ValueError, "must make whole bytes of head_dim = 7"),
        ({"pages": "int4", "value_dim": 7}, ValueError, "must make whole bytes of value_dim = 7"),
        ({"window": 0}, ValueError, "window must be at least 1 token, or None, got 0"),
        ({"window": 1.5}, ValueError, "window must be at least 1 token, or None, got 1.5"),
    ],
)
def test_bad_input(change, error, message):
    given = {"n_blocks": 4, "n_layers": 1, "n_kv_heads": 1, "head_dim": 8, **change}
    with pytest.raises(error, match=message):
        PagedKVCache(given.pop("n_blocks"), **given)


@pytest.mark.fake_tensors
def test_all_layers_in_one_compiled_graph(path):
    """Layers are views of one tensor, all of which a graph writes to."""
    cache = new_cache(n_layers=3, device=path.device)
    seq = cache.new_sequence()
    tokens = [3, 1, 4, 1, 5]
    batch = cache.append([seq], [len(tokens)])
    k = key_rows(cache, tokens).to(path.device)

    def forward(k):
        for layer, pages in enumerate(cache.layers):
            store_kv(k[layer], -k[layer], pages, batch.slot_mapping)
        return k.sum()

    torch.compile(forward, fullgraph=True, backend="aot_eager")(k)
    assert_holds(cache, seq, tokens)


def test_append_of_many_is_append_of_each():
    """With blocks shared among those appended to, and as few blocks as it takes."""
    tables = []
    for at_once in (False, True):
        cache = new_cache(9)
        a = cache.new_sequence()
        cache.append([a], [6])
        seqs = [a, cache.fork(a), cache.fork(a)]
        if at_once:
            assert cache.append(seqs, [1, 9, 3]).context_lens.tolist() == [7, 15, 9]
        else:
            for seq, n in zip(seqs, [1, 9, 3], strict=True):
                cache.append([seq], [n])
        tables.append([seq.blocks for seq in seqs])
        assert cache.allocator.n_free == 9 - 2 - 1 - 3 - 1  # copies for two of three, and what they need more
    assert tables[0] == tables[1]
