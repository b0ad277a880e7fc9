"""The paged KV cache: which block is whose, prefixes, how much memory they take, and the pages themselves."""

from lmops.cache.allocator import (
    RELEASED,
    Appended,
    BlockAllocator,
    BlockCopy,
    OutOfBlocksError,
    PagedSequence,
    SwappedSequence,
)
from lmops.cache.paged import PagedBatch, PagedKVCache, SwappedPages
from lmops.cache.plan import CachePlan, plan_cache
from lmops.cache.prefix import PrefixCache, PrefixStats

__all__ = [
    "RELEASED",
    "Appended",
    "BlockAllocator",
    "BlockCopy",
    "CachePlan",
    "OutOfBlocksError",
    "PagedBatch",
    "PagedKVCache",
    "PagedSequence",
    "PrefixCache",
    "PrefixStats",
    "SwappedPages",
    "SwappedSequence",
    "plan_cache",
]
