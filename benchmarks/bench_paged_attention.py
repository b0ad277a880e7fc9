"""Decoding over a paged KV cache: 1 to 256 ragged sequences of 1k to 128k tokens, 32 query heads and 8 key heads."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.harness import Benchmark, Variant
from lmops.ops.paged_attention import paged_attention
from lmops.ops.paged_cache import KVPages
from lmops.reference.paged_attention import paged_attention as reference

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
LARGEST = 1 << 21  # tokens in all: 8 GiB of keys and values in 16 bits


def ragged(batch: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """query, k, v, block table, lengths: half of `size` to all of it, and blocks in no order."""
    lengths = torch.randint(size // 2, size + 1, (batch,), generator=torch.Generator().manual_seed(0))
    lengths[0] = size
    width = -(-size // BLOCK)
    # heads before blocks in memory, as PagedKVCache has them
    k, v = (torch.randn(KV_HEADS, batch * width, BLOCK, DIM, device=device).to(dtype) for _ in range(2))
    table = torch.randperm(batch * width, device=device).view(batch, width).int()
    query = torch.randn(batch, HEADS, DIM, device=device).to(dtype)
    return query, k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3), table, lengths.int().to(device)


def ours(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    return paged_attention(query, KVPages(k, v), table, lengths)  # type: ignore[return-value]


def plain(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    return reference(query, k, v, table, lengths, torch.arange(len(query) + 1, dtype=torch.int32))[0]


def gathered(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """torch's attention over padded copies of keys and values."""
    keys, values = (t[table.long()].flatten(1, 2).transpose(1, 2) for t in (k, v))
    mask = torch.arange(keys.shape[2], device=query.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(query[:, :, None], keys, values, mask[:, None, None], enable_gqa=True)
    return out[:, :, 0]


kept = WeakIdKeyDictionary()


def contiguous(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """What pages cost: torch's attention a sequence over contiguous keys and values, which are made once."""
    if k not in kept:
        kept[k] = [
            [t[row[: -(-n // BLOCK)].long()].flatten(0, 1)[:n].transpose(0, 1).contiguous()[None] for t in (k, v)]
            for row, n in zip(table, lengths.tolist(), strict=True)
        ]
    outs = [
        F.scaled_dot_product_attention(q[None, :, None], keys, values, enable_gqa=True)
        for q, (keys, values) in zip(query, kept[k], strict=True)
    ]
    return torch.cat(outs)[:, :, 0]


repacked = WeakIdKeyDictionary()


def of_flash_attn(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """flash-attn takes pages of a multiple of 256 tokens: the same keys and values in such, made once."""
    from flash_attn import flash_attn_with_kvcache

    if table.shape[1] * BLOCK % 256:
        raise ImportError("flash-attn takes pages of a multiple of 256 tokens")
    if k not in repacked:
        repacked[k] = [t[table.flatten().long()].reshape(-1, 256, *t.shape[2:]) for t in (k, v)]
    pages = torch.arange(len(repacked[k][0]), dtype=torch.int32, device=query.device).view(len(query), -1)
    return flash_attn_with_kvcache(query[:, None], *repacked[k], cache_seqlens=lengths, block_table=pages)[:, 0]


def of_flashinfer(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """FlashInfer plans on the host: its plan is counted, as a serving step pays for it."""
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=query.device), "NHD"
    )
    used = -(-lengths // BLOCK)
    ends = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
    pages = torch.cat([row[:n] for row, n in zip(table, used.tolist(), strict=True)])
    wrapper.plan(ends, pages, lengths - (used - 1) * BLOCK, HEADS, KV_HEADS, DIM, BLOCK, q_data_type=query.dtype)
    return wrapper.run(query, (k.contiguous(), v.contiguous()))


def of_vllm(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(query)
    ends = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    unified_attention(
        q=query, k=k, v=v, out=out, cu_seqlens_q=ends, max_seqlen_q=1, seqused_k=lengths,
        max_seqlen_k=table.shape[1] * BLOCK, softmax_scale=DIM**-0.5, causal=True, window_size=(-1, -1),
        block_table=table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
    )  # fmt: skip
    return out


def held(query: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> int:
    """Bytes of the keys and values that are seen, of queries and of the output."""
    return int(lengths.sum()) * (k[0, 0].nbytes + v[0, 0].nbytes) + 2 * query.nbytes


def case(batch: int) -> Benchmark:
    return Benchmark(
        f"paged decode batch {batch}",
        "paged_attention",
        partial(ragged, batch),
        {
            "lmops": ours,
            "contiguous": contiguous,
            "flash-attn": of_flash_attn,
            "FlashInfer": of_flashinfer,
            "vLLM": of_vllm,
        },
        plain,
        held,
        (1_024, 8_192, 32_768, 131_072),
        small=64,
        eager=gathered,
        dtypes=(torch.bfloat16, torch.float16),
        largest=LARGEST // batch,
        sizes_on_cpu=(256, 1_024),
    )


BENCHMARKS = [case(batch) for batch in (1, 8, 64, 256)]


def decode(
    dtype: torch.dtype, form: str = "native", *, lengths=(1,), dim=DIM, block_size=BLOCK, kv_heads=KV_HEADS, width=512,
    **options,
):  # fmt: skip
    """Host code that launches attention over pages, and where keys are split the combination, on empty memory."""

    def run() -> None:
        stored = {"native": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[form]
        row = dim // 2 if form == "int4" else dim
        k, v = (torch.empty(kv_heads, 64, block_size, row, dtype=stored).permute(1, 2, 0, 3) for _ in range(2))
        shape = (kv_heads, 64, block_size)
        scales: list[Tensor | None] = [None, None]
        if form == "int4":
            scales = [torch.empty(*shape, 2, dtype=half).permute(1, 2, 0, 3) for _ in range(2)]
        elif form != "native":
            scales = [torch.empty(shape, dtype=half).permute(1, 2, 0) for _ in range(2)]
        n = len(lengths)
        table, context = torch.zeros(n, width, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
        given = {name: value() if callable(value) else value for name, value in options.items()}
        query = torch.empty(sum(lengths), HEADS, dim, dtype=dtype)
        if max(lengths) > 1:
            cu_q = torch.tensor([0, *lengths]).cumsum(0).int()
            given |= {"cu_seqlens_q": cu_q, "max_seqlen_q": max(lengths)}
        paged_attention(query, KVPages(k, v, *scales), table, context, **given)

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
CHUNK = (1_024, 1, 1)  # a prompt, and two sequences that decode
COMPILE = [
    *(Variant(f"paged-attention-bf16-{form}-decode", decode(bf16, form), "any") for form in ("native", "int8")),
    *(Variant(f"paged-attention-fp16-{form}-decode", decode(half, form), "any") for form in ("fp8", "int4")),
    *(Variant(f"paged-attention-bf16-{form}-chunk", decode(bf16, form, lengths=CHUNK), "any")
      for form in ("native", "int8", "fp8", "int4")),
    *(Variant(f"paged-attention-bf16-{dim}-{name}", decode(bf16, dim=dim, lengths=lengths), "any")
      for dim in (64, 80, 256, 512) for name, lengths in (("decode", (1,)), ("chunk", CHUNK))),
    *(Variant(f"paged-attention-fp32-{dim}-{name}", decode(fp32, dim=dim, lengths=lengths))
      for dim in (64, 128) for name, lengths in (("decode", (1,)), ("chunk", CHUNK))),
    *(Variant(f"paged-attention-fp32-{form}-{name}", decode(fp32, form, lengths=lengths))
      for form in ("int8", "fp8", "int4") for name, lengths in (("decode", (1,)), ("chunk", CHUNK))),
    *(Variant(f"paged-attention-fp32-{form}-{dim}-{name}", decode(fp32, form, dim=dim, lengths=lengths))
      for form in ("native", "int8", "fp8", "int4") for dim in (256, 512)
      for name, lengths in (("decode", (1,)), ("chunk", CHUNK))),
    Variant("paged-attention-bf16-page-256-decode", decode(bf16, block_size=256, width=32), "any"),
    Variant("paged-attention-bf16-page-256-chunk", decode(bf16, block_size=256, width=32, lengths=CHUNK), "any"),
    Variant("paged-attention-bf16-page-17-decode", decode(bf16, block_size=17), "any"),
    Variant("paged-attention-bf16-mha-decode", decode(bf16, kv_heads=HEADS), "any"),
    Variant("paged-attention-bf16-window-chunk", decode(bf16, lengths=CHUNK, window=(255, None)), "any"),
    Variant("paged-attention-bf16-softcap-alibi-sinks-chunk",
            decode(bf16, lengths=CHUNK, softcap=30.0, alibi_slopes=lambda: torch.empty(HEADS),
                   sinks=lambda: torch.empty(HEADS)), "any"),
    Variant("paged-attention-bf16-shared-prefix", decode(bf16, lengths=(1, 1, 1), shared_prefix=2_048), "any"),
]  # fmt: skip
