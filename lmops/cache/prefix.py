"""Blocks of a paged KV cache found by their tokens, so that a prompt's known beginning is not computed again."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from lmops.cache.allocator import BlockAllocator, PagedSequence


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """What a prefix cache was asked for and what it had.

    Attributes:
        n_prompts: prompts looked up.
        tokens_asked: their tokens.
        tokens_found: those of them that were cached.
        n_evicted: cached blocks that gave way to others.
    """

    n_prompts: int
    tokens_asked: int
    tokens_found: int
    n_evicted: int

    @property
    def hit_rate(self) -> float:
        """tokens_found / tokens_asked; 0 before the first prompt."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0


class PrefixKey:
    """The content of a block: its tokens, those of all blocks before it, and a salt. One object for one content.

    What it stands for is where PrefixCache keeps it, together with the key of the block before, which so stays the same
    object for as long as there is any block behind it.
    """

    __slots__ = ("__weakref__",)


class PrefixCache:
    """Finds the full blocks of an allocator by the tokens in them, those before them, and a salt.

    It keeps no state of blocks: the allocator knows which block has which key, and evicts. This class makes the keys.
    A key is looked up by the hash of (the key before it, the block's tokens), and both are compared: the tokens by
    value, the key before it by identity, which stands for its whole chain as there is one key for one content. Content
    with the same hash is therefore never taken for another. A key lives as long as a block, a sequence or a longer key
    has it.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._keys: WeakValueDictionary[tuple[PrefixKey | None, Hashable], PrefixKey] = WeakValueDictionary()
        self._n_prompts = self._tokens_asked = self._tokens_found = 0

    def allocate(self, tokens: Sequence[int], salt: Hashable = None, max_new: int | None = None) -> PagedSequence:
        """A new sequence for a prompt. Its first `n_cached` tokens are in the cache; the others are to be computed.

        It starts with the longest run of cached full blocks with these tokens, and has slots for at most max_new
        tokens behind them (default: all), to which `append` adds. At least the last token is always left to compute,
        since its output is wanted: only the tokens before it are looked up, so where a prompt of whole blocks is
        cached to its end, the last block is computed again, into a block of its own.

        salt: whose cache it is, e.g. of an adapter or a tenant. Salts that differ never share a block.
        OutOfBlocksError if there are not enough blocks; nothing is changed then, and nothing counted. TypeError for
        tokens that are not integers, ValueError for a negative max_new.
        """
        if max_new is not None and max_new < 0:
            raise ValueError(f"max_new must be at least 0, got {max_new}")
        size = self._allocator.block_size
        content = _content(tokens)
        n_tokens = len(content) // _BYTES
        key = self._keys.get((None, salt))
        keys: list[PrefixKey] = []
        for start in range(0, (n_tokens - 1) // size * size, size):
            key = self._keys.get((key, content[start * _BYTES : (start + size) * _BYTES])) if key else None
            if key is None or self._allocator.find(key) is None:
                break
            keys.append(key)
        n_cached = len(keys) * size
        n_slots = n_tokens if max_new is None else min(n_tokens, n_cached + max_new)
        seq = self._allocator.allocate(n_slots, keys, salt)
        self._n_prompts += 1
        self._tokens_asked += n_tokens
        self._tokens_found += n_cached
        return seq

    def register(self, seq: PagedSequence, tokens: Sequence[int]) -> None:
        """Makes the blocks of a sequence findable that are full of tokens whose keys and values are in the cache.

        tokens: the sequence's tokens from its start, as far as they are computed; those in blocks that were registered
        before are not read again, so a call after every token costs O(1). The sequence's salt holds.
        ValueError if there are more tokens than slots, TypeError for tokens that are not integers.
        """
        if len(tokens) > seq.n_tokens:
            raise ValueError(f"tokens must be at most the {seq.n_tokens} that the sequence has, got {len(tokens)}")
        size = self._allocator.block_size
        key = seq.keys[-1] if seq.keys else self._key(None, seq.salt)
        for i in range(len(seq.keys), len(tokens) // size):
            key = self._key(key, _content(tokens[i * size : (i + 1) * size]))
            self._allocator.add_key(seq, key)

    @property
    def stats(self) -> PrefixStats:
        """Counts since the cache was made."""
        return PrefixStats(self._n_prompts, self._tokens_asked, self._tokens_found, self._allocator.n_evicted)

    def _key(self, parent: PrefixKey | None, content: Hashable) -> PrefixKey:
        """The one key of this content behind `parent`; of a salt where there is no parent."""
        key = self._keys.get((parent, content))
        if key is None:
            key = self._keys[parent, content] = PrefixKey()
        return key


_BYTES = array("q").itemsize


def _content(tokens: Iterable[int]) -> bytes:
    try:
        return array("q", iter(tokens)).tobytes()
    except TypeError as error:
        raise TypeError(f"tokens must be a sequence of integers: {error}") from error
