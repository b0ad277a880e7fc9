"""PagedKVCache under random calls, its tensors compared with a dictionary of what every token's keys and values are.

The keys and values of a token depend on the salt and all tokens up to it, as those of a model do: so a prefix found
in the cache must hold what this sequence would have written.
"""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmops.cache import RELEASED, OutOfBlocksError, PagedKVCache
from lmops.ops.paged_cache import store_kv
from lmops.reference.paged_cache import dequantize_rows, quantize_rows

LAYERS, HEADS, DIM, VALUE_DIM = 2, 2, 4, 2
FORMATS = ("native", "int8", "fp8", "int4")


class CacheAndDictionary(RuleBasedStateMachine):
    """The model: of each live sequence its tokens; of each (salt, tokens up to one) a number; of a number the rows."""

    @initialize(n_blocks=st.integers(1, 24), block_size=st.integers(1, 5), format=st.sampled_from(FORMATS))
    def begin(self, n_blocks, block_size, format):
        self.cache = PagedKVCache(
            n_blocks, n_layers=LAYERS, n_kv_heads=HEADS, head_dim=DIM, value_dim=VALUE_DIM, block_size=block_size,
            dtype=torch.float32, pages=format,
        )  # fmt: skip
        self.format, self.size = format, block_size
        self.spoil(slice(None))
        self.tokens = {}
        self.saved = []
        self.registered = []  # (tokens, salt), which may or may not be cached still
        self.numbers = {}

    # ---- the model

    def rows(self, contexts):
        """Keys (T, layers * heads, DIM) and values of tokens, no two the same."""
        n = torch.tensor([self.numbers.setdefault(c, len(self.numbers)) for c in contexts], dtype=torch.float32)
        k = n[:, None, None] + torch.arange(LAYERS * HEADS * DIM).view(-1, DIM) / 64
        return k, -k[..., :VALUE_DIM]

    def contexts(self, seq):
        return [(seq.salt, *self.tokens[seq][: i + 1]) for i in range(len(self.tokens[seq]))]

    def write(self, seqs, starts, batch):
        new = [c for seq, start in zip(seqs, starts, strict=True) for c in self.contexts(seq)[start:]]
        k, v = self.rows(new)
        for layer, pages in enumerate(self.cache.layers):
            heads = slice(layer * HEADS, (layer + 1) * HEADS)
            store_kv(k[:, heads], v[:, heads], pages, batch.slot_mapping)

    # ---- the cache

    def tensors(self):
        p = self.cache.pages
        return [t for t in (p.k, p.v, p.k_scale, p.v_scale) if t is not None]

    def spoil(self, blocks):
        for t in self.tensors():
            if t.dtype.itemsize == 1:
                t.view(torch.uint8)[blocks] = 0xFF
            else:
                t[blocks] = float("nan")

    def read(self, pages, blocks, n_slots):
        """Keys and values of the first n_slots of blocks, of all layers."""
        for codes, scales in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
            if codes.dtype == torch.float8_e4m3fn:
                codes = codes.view(torch.uint8)[blocks].view(torch.float8_e4m3fn)
            else:
                codes = codes[blocks]
            scales = None if scales is None else scales[blocks].flatten(0, 1)[:n_slots]
            yield dequantize_rows(codes.flatten(0, 1)[:n_slots], scales, torch.float32)

    def assert_holds(self, pages, blocks, contexts):
        for got, rows in zip(self.read(pages, blocks, len(contexts)), self.rows(contexts), strict=True):
            if self.format != "native":
                rows = dequantize_rows(*quantize_rows(rows, self.format, torch.float32), torch.float32)
            assert torch.equal(got, rows)

    def snapshot(self):
        a = self.cache.allocator
        tables = [(seq, list(seq.blocks), seq.n_tokens, seq.n_released, list(seq.keys)) for seq in self.tokens]
        state = (
            tables, set(a._sequences), list(a._refs), list(a._cached), dict(a._key_of), dict(a._free._end_of),
            self.cache.prefix.stats,
        )  # fmt: skip
        return state, [t.contiguous().view(torch.uint8).clone() for t in self.tensors()]

    def attempt(self, call):
        """The call's result, or None if it found too few blocks, and then nothing has changed."""
        before = self.snapshot()
        try:
            return call()
        except OutOfBlocksError:
            after = self.snapshot()
        assert after[0] == before[0]
        assert all(map(torch.equal, after[1], before[1]))
        return None

    def pick(self, i):
        return list(self.tokens)[i % len(self.tokens)]

    def append_tokens(self, seqs, tokens):
        starts = [seq.n_tokens for seq in seqs]
        batch = self.attempt(lambda: self.cache.append(seqs, [len(t) for t in tokens]))
        if batch is None:
            return False
        for seq, new in zip(seqs, tokens, strict=True):
            self.tokens[seq] += new
        # what the batch says, token by token, from the tables
        table, positions, slots = [], [], []
        for seq, start in zip(seqs, starts, strict=True):
            table.append(list(seq.blocks))
            positions += range(start, seq.n_tokens)
            slots += [seq.blocks[i // self.size] * self.size + i % self.size for i in range(start, seq.n_tokens)]
        width = max(map(len, table))
        assert batch.block_table.tolist() == [blocks + [-1] * (width - len(blocks)) for blocks in table]
        assert batch.context_lens.tolist() == [seq.n_tokens for seq in seqs]
        assert batch.cu_seqlens_q.diff(prepend=batch.cu_seqlens_q[:1]).tolist() == [0, *map(len, tokens)]
        assert (batch.max_seqlen_q, batch.max_context) == (max(map(len, tokens)), max(s.n_tokens for s in seqs))
        assert (batch.positions.tolist(), batch.slot_mapping.tolist()) == (positions, slots)
        self.write(seqs, starts, batch)
        return True

    # ---- what may happen

    @rule(bits=st.integers(0, 2**10 - 1), salt=st.sampled_from([None, "tenant"]))
    def new(self, bits, salt):
        self.begin_with([int(bit) for bit in f"{bits:b}"], salt)

    @precondition(lambda self: self.registered)
    @rule(i=st.integers(0, 30), token=st.integers(0, 1))
    def new_after_what_was_registered(self, i, token):
        tokens, salt = self.registered[-1 - i % len(self.registered)]
        self.begin_with([*tokens, token], salt)

    def begin_with(self, prompt, salt):
        seq = self.cache.new_sequence(prompt, salt)
        assert seq.n_tokens < len(prompt)
        self.tokens[seq] = prompt[: seq.n_tokens]
        self.append_tokens([seq], [prompt[seq.n_tokens :]])

    @precondition(lambda self: self.tokens)
    @rule(which=st.lists(st.integers(0, 30), min_size=1, max_size=4), bits=st.integers(0, 2**9 - 1),
          counts=st.lists(st.integers(0, 6), min_size=4, max_size=4))  # fmt: skip
    def append(self, which, bits, counts):
        seqs = list(dict.fromkeys(map(self.pick, which)))
        self.append_tokens(seqs, [[bits >> i & 1 for i in range(n)] for n in counts[: len(seqs)]])

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), behind=st.integers(0, 6))
    def register(self, i, behind):
        seq = self.pick(i)
        tokens = self.tokens[seq][: max(0, seq.n_tokens - behind)]
        self.cache.register(seq, tokens)
        self.registered.append((tokens, seq.salt))

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def fork(self, i):
        seq = self.pick(i)
        self.tokens[self.cache.fork(seq)] = list(self.tokens[seq])

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def free(self, i):
        seq = self.pick(i)
        del self.tokens[seq]
        self.cache.free(seq)

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), n=st.integers(0, 8))
    def truncate(self, i, n):
        seq = self.pick(i)
        n_tokens = max(seq.n_tokens - n, seq.n_released * self.size)
        self.cache.truncate(seq, n_tokens)
        del self.tokens[seq][n_tokens:]

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), window=st.integers(0, 8))
    def release(self, i, window):
        seq = self.pick(i)
        self.cache.release_before(seq, max(0, seq.n_tokens - window))

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def swap_out(self, i):
        seq = self.pick(i)
        contexts = self.contexts(seq)[seq.n_released * self.size :]
        swapped = self.cache.swap_out(seq)
        self.saved.append((swapped, contexts, self.tokens.pop(seq)))

    @precondition(lambda self: self.saved)
    @rule(i=st.integers(0, 30), keep=st.booleans())
    def swap_in(self, i, keep):
        swapped, _, tokens = self.saved[i % len(self.saved)]
        seq = self.attempt(lambda: self.cache.swap_in(swapped))
        if seq is not None:
            self.tokens[seq] = list(tokens)
            if not keep:
                self.saved.pop(i % len(self.saved))

    # ---- what always holds

    @invariant()
    def every_token_is_where_its_table_says(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.allocator._sequences == set(self.tokens)
        for seq in self.tokens:
            assert seq.blocks[: seq.n_released] == [RELEASED] * seq.n_released
            contexts = self.contexts(seq)[seq.n_released * self.size :]
            if contexts:
                self.assert_holds(self.cache.pages, seq.blocks[seq.n_released :], contexts)
        for swapped, contexts, _ in self.saved:
            if contexts:
                self.assert_holds(swapped.pages, list(range(swapped.pages.n_blocks)), contexts)
        # what is free holds garbage
        a = self.cache.allocator
        free = [b for b in range(a.n_blocks) if a._refs[b] == 0 and b not in a._key_of]
        self.spoil(free)


TestCacheAndDictionary = CacheAndDictionary.TestCase
TestCacheAndDictionary.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_the_machine_notices_a_missing_copy(monkeypatch):
    """The test can fail: without copy-on-write's copy, what a fork shares is lost."""
    monkeypatch.setattr("lmops.cache.paged.copy_blocks", lambda pages, copies: None)
    machine = CacheAndDictionary()
    machine.begin(n_blocks=8, block_size=4, format="native")
    machine.new(bits=0b101101, salt=None)
    machine.fork(0)
    machine.append([0], bits=5, counts=[1] * 4)
    with pytest.raises(AssertionError):
        machine.every_token_is_where_its_table_says()
