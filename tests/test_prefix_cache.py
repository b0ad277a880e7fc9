"""PrefixCache: what is found, whose it is, and allocator and cache together against a naive model."""

import gc
from weakref import WeakKeyDictionary

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmops.cache import RELEASED, BlockAllocator, OutOfBlocksError, PrefixCache, PrefixStats
from lmops.cache import prefix as prefix_module


def new_cache(n_blocks=16, block_size=4):
    allocator = BlockAllocator(n_blocks, block_size)
    return allocator, PrefixCache(allocator)


def computed(cache, tokens, salt=None):
    """A sequence whose tokens are all in the cache, and registered."""
    seq = cache.allocate(tokens, salt)
    cache.register(seq, tokens)
    return seq


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 256])
def test_the_longest_prefix_of_full_blocks_is_found(block_size):
    allocator, cache = new_cache(8, block_size)
    tokens = list(range(3 * block_size))
    first = computed(cache, tokens)
    for n_same in range(len(tokens) + 1):
        prompt = tokens[:n_same] + [-1] * 2
        seq = cache.allocate(prompt)
        assert seq.n_cached == n_same // block_size * block_size
        assert seq.n_tokens == len(prompt)
        n_shared = n_same // block_size
        assert seq.blocks[:n_shared] == first.blocks[:n_shared]
        assert not set(seq.blocks[n_shared:]) & set(first.blocks)
        allocator.free(seq)
    allocator.check_integrity()


@pytest.mark.parametrize(("n_tokens", "n_cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_a_token_is_always_left_to_compute(n_tokens, n_cached):
    allocator, cache = new_cache()
    tokens = list(range(n_tokens))
    allocator.free(computed(cache, tokens))
    seq = cache.allocate(tokens)
    assert seq.n_cached == n_cached
    # the block that is computed again is the sequence's own, and the cached one stays
    cache.register(seq, tokens)
    twin = cache.allocate([*tokens, 99])
    assert twin.n_cached == n_tokens // 4 * 4
    allocator.check_integrity()


def test_chunks_of_a_prompt():
    allocator, cache = new_cache()
    allocator.free(computed(cache, range(8)))
    prompt = [*range(8), *range(100, 110)]
    seq = cache.allocate(prompt, max_new=5)
    assert (seq.n_cached, seq.n_tokens) == (8, 13)
    cache.register(seq, prompt[:13])
    assert cache.allocate(prompt, max_new=0).n_tokens == 12
    allocator.append(seq, 5)
    cache.register(seq, prompt)
    assert cache.allocate(prompt, max_new=100).n_tokens == 18
    with pytest.raises(ValueError, match="max_new must be at least 0, got -1"):
        cache.allocate(prompt, max_new=-1)


def test_blocks_are_registered_as_they_fill():
    allocator, cache = new_cache()
    seq = cache.allocate([7])
    tokens = [7]
    for token in range(20, 31):
        cache.register(seq, tokens)
        assert len(seq.keys) == len(tokens) // 4
        allocator.append(seq)
        tokens.append(token)
    found = cache.allocate([*tokens, 0])
    assert found.n_cached == 8  # 12 tokens have slots, 11 were registered
    assert found.blocks[:2] == seq.blocks[:2]


def test_two_salts_never_share():
    allocator, cache = new_cache()
    tokens = list(range(9))
    salts = [None, "a", "b", ("a",), 0, b"", b"\0" * 8]
    own = {salt: cache.allocate(tokens, salt) for salt in salts[:4]}
    assert [seq.n_cached for seq in own.values()] == [0] * 4
    for seq in own.values():
        cache.register(seq, tokens)
    for salt in salts:
        seq = cache.allocate(tokens, salt, max_new=0)
        assert seq.blocks == (own[salt].blocks[:2] if salt in own else [])
        assert seq.salt == salt
        # forks and their keys stay with their owner
        twin = allocator.fork(seq)
        assert (twin.salt, twin.keys) == (seq.salt, seq.keys)


def test_the_same_tokens_behind_others_are_not_the_same():
    _, cache = new_cache()
    computed(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    assert cache.allocate([2, 2, 2, 2, 0]).n_cached == 0
    assert cache.allocate([3, 3, 3, 3, 2, 2, 2, 2, 0]).n_cached == 0
    assert cache.allocate([1, 1, 1, 1, 1, 1, 1, 1, 0]).n_cached == 4


def test_a_prefix_computed_twice_is_kept_once():
    allocator, cache = new_cache()
    tokens = list(range(8))
    a, b = cache.allocate(tokens), cache.allocate(tokens)
    cache.register(a, tokens)
    cache.register(b, tokens)
    assert a.keys == b.keys
    assert cache.allocate([*tokens, 0]).blocks[:2] == a.blocks
    allocator.free(b)
    assert allocator.n_cached == 0
    allocator.check_integrity()


def test_hash_collisions_find_nothing_wrong(monkeypatch):
    """Every hash is the same, of contents and of keys: what differs must still differ."""

    class Colliding(bytes):
        def __getitem__(self, index):
            return Colliding(super().__getitem__(index))

        def __hash__(self):
            return 1

    content = prefix_module._content
    monkeypatch.setattr(prefix_module, "_content", lambda tokens: Colliding(content(tokens)))
    monkeypatch.setattr(prefix_module.PrefixKey, "__hash__", lambda key: 1, raising=False)
    _, cache = new_cache(64, 2)
    prompts = [[a, b, c, d] for a in range(2) for b in range(2) for c in range(2) for d in range(2)]
    own = {tuple(p): computed(cache, p) for p in prompts}
    keys = [key for seq in own.values() for key in seq.keys]
    assert len(set(map(id, keys))) == 4 + 16
    assert {hash(item) for item in cache._keys if item[0] is not None} == {hash((keys[0], Colliding()))}
    for prompt in prompts:
        found = cache.allocate([*prompt, 9], max_new=0)
        assert found.keys == own[tuple(prompt)].keys
    assert cache.allocate([0, 2, 0, 0, 9]).n_cached == 0


def test_tokens_whose_python_hashes_collide():
    assert hash(-1) == hash(-2)
    _, cache = new_cache(block_size=1)
    computed(cache, [-1])
    assert cache.allocate([-2, 0]).n_cached == 0
    assert cache.allocate([-1, 0]).n_cached == 1


def test_least_recently_used_goes_first_and_a_prompt_loses_its_end_first():
    allocator, cache = new_cache(8, 1)
    prompts = [[i, i + 100, i + 200] for i in (1, 2)]
    for prompt in prompts:
        allocator.free(computed(cache, prompt))
    allocator.free(cache.allocate([*prompts[0], 0], max_new=0))  # used again
    assert (allocator.n_free, allocator.n_cached) == (2, 6)

    def found():
        sequences = [cache.allocate([*prompt, 0], max_new=0) for prompt in prompts]
        counts = [seq.n_cached for seq in sequences]
        for seq in reversed(sequences):  # the same order as before
            allocator.free(seq)
        return counts

    taken = []
    expected = [[3, 3], [3, 3], [3, 2], [3, 1], [3, 0], [2, 0], [1, 0], [0, 0]]
    for n_evicted, counts in zip([0, 0, 1, 2, 3, 4, 5, 6], expected, strict=True):
        taken.append(allocator.allocate(1))
        assert cache.stats.n_evicted == n_evicted
        assert found() == counts
        allocator.check_integrity()


def test_what_is_found_is_not_evicted_for_the_rest():
    allocator, cache = new_cache(4, 1)
    allocator.free(computed(cache, [1, 2, 3, 4]))
    seq = cache.allocate([1, 2, 9, 9])
    assert seq.n_cached == 2
    assert cache.stats.n_evicted == 2
    allocator.free(seq)
    with pytest.raises(OutOfBlocksError, match="3 blocks were asked for, 2 of 4 are available"):
        cache.allocate([1, 2, 9, 9, 9])
    allocator.check_integrity()
    assert cache.allocate([1, 2, 9, 9]).n_cached == 2


def test_statistics():
    allocator, cache = new_cache(4, 2)
    assert cache.stats == PrefixStats(0, 0, 0, 0)
    assert cache.stats.hit_rate == 0
    allocator.free(computed(cache, [1, 2, 3, 4, 5]))
    seq = cache.allocate([1, 2, 3, 4, 5])
    assert cache.stats == PrefixStats(2, 10, 4, 0)
    assert cache.stats.hit_rate == 0.4
    with pytest.raises(OutOfBlocksError):
        cache.allocate([1, 2, *range(10, 20)])
    assert cache.stats == PrefixStats(2, 10, 4, 0)
    allocator.free(seq)
    allocator.allocate(8)
    assert cache.stats == PrefixStats(2, 10, 4, 2)


def test_writing_into_a_truncated_block_ends_what_it_was_found_for():
    allocator, cache = new_cache()
    tokens = list(range(8))
    seq = computed(cache, tokens)
    allocator.truncate(seq, 6)
    assert len(seq.keys) == 1
    assert cache.allocate([*tokens, 9], max_new=0).n_cached == 8  # nothing was written yet, and now it is shared
    ((src, dst, n_copied),) = allocator.append(seq).copies
    assert (n_copied, seq.blocks[-1]) == (2, dst)
    assert cache.allocate([*tokens, 9], max_new=0).blocks[-1] == src

    alone = computed(cache, tokens, "alone")
    allocator.truncate(alone, 6)
    assert allocator.append(alone).copies == []
    assert cache.allocate([*tokens, 9], "alone", max_new=0).n_cached == 4
    cache.register(alone, tokens[:6])
    allocator.append(alone)
    cache.register(alone, [*tokens[:6], 50, 51])
    assert cache.allocate([*tokens[:6], 50, 51, 9], "alone", max_new=0).n_cached == 8
    allocator.check_integrity()


def test_n_cached_follows_the_sequence():
    allocator, cache = new_cache()
    computed(cache, range(12))
    seq = cache.allocate(range(12))
    assert allocator.fork(seq).n_cached == 8
    back, _ = allocator.swap_in(allocator.swap_out(seq)[1])
    assert back.n_cached == 8
    allocator.truncate(back, 5)
    assert back.n_cached == 5


def test_swapped_sequences_find_their_blocks_again():
    allocator, cache = new_cache()
    tokens = list(range(11))
    seq = computed(cache, tokens, "tenant")
    saved, record = allocator.swap_out(seq)
    assert allocator.n_cached == 2
    back, copies = allocator.swap_in(record)
    assert copies == [(2, back.blocks[2])]  # the full blocks were still there
    assert back.blocks[:2] == saved[:2]

    _, record = allocator.swap_out(back)
    allocator.free(allocator.allocate(64))  # evicts all
    back, copies = allocator.swap_in(record)
    assert [index for index, _ in copies] == [0, 1, 2]
    assert cache.allocate([*tokens, 0], "tenant").n_cached == 8
    assert cache.allocate([*tokens, 0]).n_cached == 0
    cache.register(back, tokens)
    allocator.append(back)
    cache.register(back, [*tokens, 11])
    assert cache.allocate([*tokens, 11, 0], "tenant").n_cached == 12
    allocator.check_integrity()


def test_blocks_behind_a_window_stay_findable_and_what_follows_connects_again():
    allocator, cache = new_cache(6, 2)
    tokens = list(range(8))
    seq = computed(cache, tokens)
    assert allocator.release_before(seq, 5) == 2
    assert cache.allocate([*tokens, 9], max_new=0).n_cached == 8
    other = allocator.allocate(4)  # the two free blocks
    for live in list(allocator._sequences - {seq, other}):
        allocator.free(live)
    allocator.append(other, 4)  # and the two cached ones
    assert cache.allocate([*tokens, 9], max_new=0).n_cached == 0
    allocator.free(other)
    start = computed(cache, tokens[:4])
    assert cache.allocate([*tokens, 9], max_new=0).blocks == [*start.blocks, *seq.blocks[2:]]
    # a block released before it was registered has a key, but cannot be found
    late = cache.allocate([50, 51, 52, 53], "late")
    allocator.release_before(late, 2)
    cache.register(late, [50, 51, 52, 53])
    assert cache.allocate([50, 51, 52, 53], "late", max_new=0).n_cached == 0
    allocator.check_integrity()


def test_keys_die_with_their_last_use():
    allocator, cache = new_cache(20_000, 1)
    seq = computed(cache, range(20_000))
    assert len(cache._keys) == 20_001  # one of them for the salt
    _, record = allocator.swap_out(seq)
    del seq
    allocator.free(allocator.allocate(20_000))
    assert allocator.n_cached == 0
    assert len(cache._keys) == 20_001  # the record's; a chain as long as this one goes without recursion
    del record
    gc.collect()
    assert len(cache._keys) == 0


@pytest.mark.parametrize("tokens", [[1.0, 2.0], "12", [None]])
def test_tokens_that_are_no_integers(tokens):
    allocator, cache = new_cache(block_size=1)
    with pytest.raises(TypeError, match="tokens must be a sequence of integers"):
        cache.allocate(tokens)
    seq = allocator.allocate(4)
    with pytest.raises(TypeError, match="tokens must be a sequence of integers"):
        cache.register(seq, tokens)
    assert seq.keys == []


def test_integers_of_any_kind_are_the_same_tokens():
    import numpy as np
    import torch

    _, cache = new_cache(block_size=2)
    computed(cache, [1, 2, 3, 4])
    for tokens in ((1, 2, 3), bytes([1, 2, 3]), np.array([1, 2, 3], np.int32), torch.tensor([1, 2, 3]), range(1, 4)):
        assert cache.allocate(tokens).n_cached == 2


def test_sequences_that_cannot_be_registered():
    allocator, cache = new_cache()
    seq = cache.allocate([1, 2, 3, 4])
    with pytest.raises(ValueError, match="tokens must be at most the 4 that the sequence has, got 5"):
        cache.register(seq, [1, 2, 3, 4, 5])
    foreign = BlockAllocator(4, 4).allocate(4)
    with pytest.raises(ValueError, match="seq must be a live sequence of this allocator"):
        cache.register(foreign, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="seq must have a full block without a key, got 0 keys and 3 tokens"):
        allocator.add_key(allocator.allocate(3), "key")
    with pytest.raises(ValueError, match="keys must all be of cached blocks, got 1 of which 0 are"):
        allocator.allocate(4, ["unknown"])
    cache.register(seq, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="keys must be of full blocks of 3 tokens, got 1 of 4"):
        allocator.allocate(3, seq.keys)
    allocator.check_integrity()


class AllocatorAndCache(RuleBasedStateMachine):
    """Random calls, beside a dictionary of sequence -> tokens and a memory of slot -> what was written there.

    What belongs in the slot of a token is all that its keys and values depend on: salt and tokens up to it.
    """

    @initialize(n_blocks=st.integers(1, 40), block_size=st.integers(1, 5))
    def begin(self, n_blocks, block_size):
        self.allocator, self.cache = new_cache(n_blocks, block_size)
        self.size = block_size
        self.tokens = {}  # sequence -> its tokens
        self.memory = {}  # slot -> content
        self.content = WeakKeyDictionary()  # key -> contents of a block
        self.saved = []  # (record, its blocks' contents, tokens)

    # ---- the naive model

    def contents(self, seq):
        return [(seq.salt, *self.tokens[seq][: i + 1]) for i in range(len(self.tokens[seq]))]

    def block(self, block):
        return tuple(self.memory.get(block * self.size + i) for i in range(self.size))

    def findable(self):
        return {self.content[key] for key in self.allocator._key_of.values()}

    def used(self):
        return {block for seq in self.tokens for block in seq.blocks[seq.n_released :]}

    def write(self, seq, start):
        contents = self.contents(seq)
        slots = self.allocator.slots(seq, start)
        assert len(slots) == len(contents) - start
        self.memory.update(zip(slots, contents[start:], strict=True))

    def snapshot(self):
        a = self.allocator
        tables = [(seq, list(seq.blocks), seq.n_tokens, seq.n_released, list(seq.keys)) for seq in self.tokens]
        return (
            tables, set(a._sequences), list(a._refs), list(a._cached), dict(a._key_of), dict(a._free._end_of),
            [list(runs) for runs in a._free._by_size], self.cache.stats,
        )  # fmt: skip

    def attempt(self, n_needed, kept, call):
        """The call's result, or None if n_needed blocks are more than those neither in use nor in `kept`."""
        n_available = self.allocator.n_blocks - len(self.used() | set(kept))
        if n_needed <= n_available:
            return call()
        before = self.snapshot()
        with pytest.raises(OutOfBlocksError) as error:
            call()
        assert (error.value.n_asked, error.value.n_available) == (n_needed, n_available)
        assert self.snapshot() == before
        return None

    def pick(self, i):
        return list(self.tokens)[i % len(self.tokens)]

    def blocks_for(self, n_tokens):
        return -(-n_tokens // self.size)

    # ---- what may happen

    @rule(bits=st.integers(0, 2**18 - 1), salt=st.sampled_from([None, None, "tenant"]), max_new=st.integers(0, 30))
    def allocate(self, bits, salt, max_new):
        prompt = [int(bit) for bit in f"{bits:b}"]
        max_new = None if max_new > 20 else max_new
        n_found, findable, shared = 0, self.findable(), []
        for end in range(self.size, len(prompt), self.size):
            wanted = tuple((salt, *prompt[: i + 1]) for i in range(end - self.size, end))
            if wanted not in findable:
                break
            n_found = end
            shared += [block for block, key in self.allocator._key_of.items() if self.content[key] == wanted]
        n_tokens = len(prompt) if max_new is None else min(len(prompt), n_found + max_new)
        n_new = self.blocks_for(n_tokens) - n_found // self.size
        seq = self.attempt(n_new, shared, lambda: self.cache.allocate(prompt, salt, max_new))
        if seq:
            assert (seq.n_cached, seq.n_tokens) == (n_found, n_tokens)
            assert seq.blocks[: len(shared)] == shared
            self.tokens[seq] = prompt[:n_tokens]
            self.write(seq, n_found)

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), bits=st.integers(0, 2**8 - 1), n=st.integers(0, 7))
    def append(self, i, bits, n):
        seq = self.pick(i)
        n_before, table = seq.n_tokens, list(seq.blocks)
        shared = n > 0 and n_before % self.size > 0 and sum(table[-1] in s.blocks for s in self.tokens) > 1
        n_new = self.blocks_for(n_before + n) - len(table)
        appended = self.attempt(n_new + shared, (), lambda: self.allocator.append(seq, n))
        if appended:
            assert len(appended.copies) == shared
            for src, dst, n_copied in appended.copies:
                assert (src, table.pop()) == (src, src)
                assert n_copied == n_before % self.size
                table.append(dst)
                for k in range(n_copied):
                    self.memory[dst * self.size + k] = self.memory[src * self.size + k]
            assert seq.blocks == table + appended.new_blocks
            self.tokens[seq] += [bits >> k & 1 for k in range(n)]
            self.write(seq, n_before)

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), behind=st.integers(0, 6))
    def register(self, i, behind):
        seq = self.pick(i)
        self.cache.register(seq, self.tokens[seq][: max(0, seq.n_tokens - behind)])
        contents = self.contents(seq)
        for k, key in enumerate(seq.keys):
            expected = tuple(contents[k * self.size : (k + 1) * self.size])
            assert self.content.setdefault(key, expected) == expected

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def fork(self, i):
        seq = self.pick(i)
        self.tokens[self.allocator.fork(seq)] = list(self.tokens[seq])

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def free(self, i):
        seq = self.pick(i)
        del self.tokens[seq]
        self.allocator.free(seq)
        assert (seq.blocks, seq.n_tokens) == ([], 0)
        with pytest.raises(ValueError, match="live sequence"):
            self.allocator.append(seq)

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), n=st.integers(0, 8))
    def truncate(self, i, n):
        seq = self.pick(i)
        n_tokens = max(seq.n_tokens - n, seq.n_released * self.size)
        self.allocator.truncate(seq, n_tokens)
        del self.tokens[seq][n_tokens:]

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30), window=st.integers(0, 8))
    def release(self, i, window):
        seq = self.pick(i)
        before, position = seq.n_released, max(0, seq.n_tokens - window)
        n = self.allocator.release_before(seq, position)
        assert seq.n_released == max(before, position // self.size) == before + n

    @precondition(lambda self: self.tokens)
    @rule(i=st.integers(0, 30))
    def swap_out(self, i):
        seq = self.pick(i)
        tokens = self.tokens.pop(seq)
        table = seq.blocks[seq.n_released :]
        blocks, record = self.allocator.swap_out(seq)
        assert blocks == table
        self.saved.append((record, [self.block(block) for block in blocks], tokens))

    @precondition(lambda self: self.saved)
    @rule(i=st.integers(0, 30), keep=st.booleans())
    def swap_in(self, i, keep):
        record, contents, tokens = self.saved[i % len(self.saved)]
        findable = {self.content[key]: block for block, key in self.allocator._key_of.items()}
        n_keys = len(record.keys[record.n_released :])
        shared = {k: findable[contents[k]] for k in range(n_keys) if contents[k] in findable}
        n_new = len(contents) - len(shared)
        result = self.attempt(n_new, shared.values(), lambda: self.allocator.swap_in(record))
        if result:
            seq, copies = result
            table = seq.blocks[seq.n_released :]
            assert copies == [(k, block) for k, block in enumerate(table) if k not in shared]
            for k, block in copies:
                self.memory.update({block * self.size + o: c for o, c in enumerate(contents[k])})
            self.tokens[seq] = list(tokens)
            if not keep:
                self.saved.pop(i % len(self.saved))

    # ---- what always holds

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "allocator"):
            return
        allocator, used = self.allocator, self.used()
        allocator.check_integrity()
        assert allocator._sequences == set(self.tokens)
        assert allocator.n_available == allocator.n_blocks - len(used)
        for seq in self.tokens:
            start = seq.n_released * self.size
            assert seq.blocks[: seq.n_released] == [RELEASED] * seq.n_released
            assert [self.memory[slot] for slot in allocator.slots(seq, start)] == self.contents(seq)[start:]
        for block, key in allocator._key_of.items():
            assert self.block(block) == self.content[key]
        # what is free holds garbage
        for block in set(range(allocator.n_blocks)) - used - allocator._key_of.keys():
            for offset in range(self.size):
                self.memory.pop(block * self.size + offset, None)


TestAllocatorAndCache = AllocatorAndCache.TestCase
TestAllocatorAndCache.settings = settings(
    max_examples=400, stateful_step_count=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
