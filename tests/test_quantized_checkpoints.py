"""Weights of other programs' quantized checkpoints: the packing by the formats' own definitions, and whole models."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGML
from safetensors.torch import load_file, save_file
from test_loading import TOKENS, WIDE, make, write_gguf

from lmops.models import CheckpointError, load, save
from lmops.quantization import JoinedLinear, QuantEmbedding, QuantizedTensor, QuantLinear
from lmops.quantization.checkpoints import (
    from_awq,
    from_compressed_tensors,
    from_gguf,
    from_gptq,
    join_rows,
    reorder_rows,
)
from lmops.testing import assert_accurate

# ---- the formats, written out -------------------------------------------------------------------------------------
# Each takes codes (n_out, n_in) of `bits` bits from 0 and zero points (n_out, groups) as numpy arrays.


def words(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), np.uint32)


def int32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int32).copy())


def gptq_tensors(codes, zeros, scales, bits, version, g_idx):
    """AutoGPTQ's pack(): codes along the inputs, zero points (less one in version 1) along the outputs."""
    n_out, n_in = codes.shape
    per_word = 32 // bits
    qweight, qzeros = words(n_in // per_word, n_out), words(zeros.shape[1], n_out // per_word)
    for k in range(n_in):
        qweight[k // per_word] |= codes[:, k].astype(np.uint32) << np.uint32(bits * (k % per_word))
    for n in range(n_out):
        stored = (zeros[n] - (1 if version == 1 else 0)).astype(np.uint32)
        qzeros[:, n // per_word] |= stored << np.uint32(bits * (n % per_word))
    tensors = {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": scales.T.contiguous()}
    return tensors | {"g_idx": torch.as_tensor(g_idx, dtype=torch.int32)}


def awq_tensors(codes, zeros, scales):
    """AutoAWQ's WQLinear_GEMM.from_linear(): eight outputs a word in this order, from the lowest bits."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values):  # (n, n_out)
        packed = words(len(values), values.shape[1] // 8)
        for column in range(packed.shape[1]):
            for i, of in enumerate(order):
                packed[:, column] |= values[:, column * 8 + of].astype(np.uint32) << np.uint32(4 * i)
        return int32(packed)

    return {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.contiguous()}


def compressed_tensors(codes, zeros, scales, bits, packed_zeros=True):
    """compressed-tensors' pack_to_int32(): signed values plus 2^(bits-1), rows filled up to whole words."""
    per_word = 32 // bits

    def pack(values):  # signed (n, m) along m
        packed = words(len(values), -(-values.shape[1] // per_word))
        for j in range(values.shape[1]):
            unsigned = (values[:, j] + (1 << (bits - 1))).astype(np.uint32)
            packed[:, j // per_word] |= unsigned << np.uint32(bits * (j % per_word))
        return packed

    half = 1 << (bits - 1)
    tensors = {
        "weight_packed": int32(pack(codes.astype(np.int32) - half)),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zeros is None:
        return tensors
    signed = zeros.astype(np.int32) - half
    packed = int32(np.ascontiguousarray(pack(signed.T).T)) if packed_zeros else torch.from_numpy(signed).to(torch.int8)
    return tensors | {"weight_zero_point": packed}


def numbers(n_out, n_in, groups, bits, seed=0, symmetric=False):
    """Random codes, zero points and scales, with both ends of their ranges."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (n_out, n_in))
    codes[0, :2] = (0, (1 << bits) - 1)
    zeros = np.full((n_out, groups), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (n_out, groups))
    return codes, zeros, torch.from_numpy(rng.uniform(0.5, 2, (n_out, groups)) / (1 << bits)).half()


def weight_of(codes, zeros, scales, g_idx):
    """w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) with g the group of column k."""
    steps = torch.from_numpy(codes.astype(np.float32) - zeros[:, g_idx])
    return scales.float()[:, g_idx] * steps


def groups_of(n_in, group_size, shuffled=False, seed=0):
    g_idx = np.arange(n_in) // group_size
    return np.random.default_rng(seed).permutation(g_idx) if shuffled else g_idx


# ---- one weight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in_order", "act_order"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_gptq(bits, symmetric, version, shuffled):
    n_out, n_in, size = 24, 96, 32
    g_idx = groups_of(n_in, size, shuffled)
    codes, zeros, scales = numbers(n_out, n_in, 3, bits, symmetric=symmetric)
    t = gptq_tensors(codes, zeros, scales, bits, version, g_idx)
    weight = from_gptq(*t.values(), bits=bits, group_size=size, version=version, symmetric=symmetric, name="layer")
    assert torch.equal(weight.codes().long() + (128 if bits == 8 else 0), torch.from_numpy(codes))
    assert (weight.permutation is not None) == shuffled
    assert (weight.zeros is None) == symmetric
    assert torch.equal(weight.dequantize(), weight_of(codes, zeros, scales, g_idx))


def test_gptq_word_by_word():
    """One word: the input k of 8 is in bits 4 k to 4 k + 3; version 1 keeps the zero point 8 as 7."""
    qweight = int32(np.array([[0x76543210] * 8], np.uint32))
    qzeros = int32(np.array([[0x77777777]], np.uint32))
    scales = torch.ones(1, 8, dtype=torch.float16)
    weight = from_gptq(qweight, qzeros, scales, None, bits=4, group_size=-1, version=1, symmetric=True, name="layer")
    assert weight.dequantize()[3].tolist() == [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    with pytest.raises(ValueError, match=r"qzeros of layer hold a zero point of 7, but a symmetric weight has 8"):
        from_gptq(qweight, qzeros, scales, None, bits=4, group_size=-1, version=2, symmetric=True, name="layer")


def test_awq():
    codes, zeros, scales = numbers(40, 64, 2, 4)
    weight = from_awq(*awq_tensors(codes, zeros, scales).values(), group_size=32, name="layer")
    assert torch.equal(weight.codes().long(), torch.from_numpy(codes))
    assert torch.equal(weight.dequantize(), weight_of(codes, zeros, scales, groups_of(64, 32)))


def test_awq_word_by_word():
    """The outputs 0 to 7 are in the nibbles 0 4 1 5 2 6 3 7, from the lowest."""
    qweight = int32(np.array([[0x75316420]] * 16, np.uint32))
    zeros, scales = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8, dtype=torch.float16)
    weight = from_awq(qweight, zeros, scales, group_size=-1, name="layer")
    assert weight.dequantize()[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("kind", ["symmetric", "packed_zeros", "int8_zeros"])
@pytest.mark.parametrize(("bits", "n_in"), [(4, 96), (4, 75), (8, 96), (8, 75)])
def test_compressed_tensors(bits, n_in, kind):
    n_out, size = 13, 32  # neither fills whole words
    codes, zeros, scales = numbers(n_out, n_in, 3, bits, symmetric=kind == "symmetric")
    t = compressed_tensors(codes, None if kind == "symmetric" else zeros, scales, bits, kind == "packed_zeros")
    weight = from_compressed_tensors(
        t["weight_packed"], t["weight_scale"], t.get("weight_zero_point"), None,
        shape=codes.shape, bits=bits, group_size=size, symmetric=kind == "symmetric", name="layer",
    )  # fmt: skip
    assert torch.equal(weight.codes().long() + (128 if bits == 8 else 0), torch.from_numpy(codes))
    assert torch.equal(weight.dequantize(), weight_of(codes, zeros, scales, groups_of(n_in, size)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_blocks_are_exact(kind):
    """Against the package that defines them; 1,100 rows of 512 are packed in two chunks."""
    values = np.random.default_rng(0).normal(size=(1100, 512)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGML[kind])
    weight = from_gguf(torch.from_numpy(raw), kind, values.shape, "layer")
    assert weight.bits == (8 if kind == "Q8_0" else 4)
    assert torch.equal(weight.dequantize(), torch.from_numpy(gguf.quants.dequantize(raw, GGML[kind])))
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reorder_rows(weight, order).dequantize(), weight.dequantize()[order])


def test_rows_join_where_the_formats_agree():
    a, b = (QuantizedTensor.quantize(torch.randn(n, 64), 4, 32, symmetric=False) for n in (3, 5))
    joined = join_rows([a, b])
    assert joined.shape == (8, 64)
    assert torch.equal(joined.dequantize(), torch.cat((a.dequantize(), b.dequantize())))
    others = [
        QuantizedTensor.quantize(torch.randn(3, 64), 4, 32),
        QuantizedTensor.quantize(torch.randn(3, 64), 4, 16, symmetric=False),
        QuantizedTensor.quantize(torch.randn(3, 64), 8, 32, symmetric=False),
        QuantizedTensor.quantize(torch.randn(3, 64), 4, 32, symmetric=False, scale_dtype=torch.float16),
    ]
    assert [join_rows([a, other]) for other in others] == [None] * 4
    permuted = []
    for seed in (0, 0, 1):
        codes, zeros, scales = (torch.as_tensor(t) for t in numbers(3, 64, 2, 4))
        index = torch.from_numpy(groups_of(64, 32, True, seed))
        permuted.append(QuantizedTensor.from_codes(codes, scales, zeros, group_size=32, group_index=index))
    assert join_rows(permuted[:2]).permutation is not None
    assert join_rows(permuted[1:]) is None


# ---- folders ------------------------------------------------------------------------------------------------------

GROUP = 16
FORMATS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "gptq_asymmetric": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False},
    "gptq_v2": {
        "quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "gptq_act_order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True},
    "gptq_row": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "input_activations": None,
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP,
                },
            }
        },
    },
    "compressed_8_bits": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"}}},
    },
}  # fmt: skip


@torch.no_grad()
def save_quantized(folder, name, model="llama", same_order=True, **changes):
    """A folder whose linear layers but the head are quantized, and the transformers model with the numbers in it."""
    config = FORMATS[name]
    network = make(model, **changes)
    network.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    weights = config.get("config_groups", {}).get("group_0", {}).get("weights", {})
    bits = config.get("bits") or weights["num_bits"]
    size = config.get("group_size") or weights.get("group_size", -1)
    symmetric = config.get("sym", weights.get("symmetric", False))
    for seed, (key, module) in enumerate(network.named_modules()):
        conv = type(module).__name__ == "Conv1D"
        if not (conv or isinstance(module, torch.nn.Linear)) or key == "lm_head":
            continue
        n_out, n_in = module.weight.T.shape if conv else module.weight.shape
        groups = 1 if size == -1 else n_in // size
        order_seed = n_in if same_order else seed
        g_idx = groups_of(n_in, n_in if size == -1 else size, config.get("desc_act", False), order_seed)
        codes, zeros, scales = numbers(n_out, n_in, groups, bits, seed, symmetric)
        if name == "awq":
            parts = awq_tensors(codes, zeros, scales)
        elif name.startswith("gptq"):
            parts = gptq_tensors(codes, zeros, scales, bits, 2 if name == "gptq_v2" else 1, g_idx)
        else:
            parts = compressed_tensors(codes, None if symmetric else zeros, scales, bits)
        weight = weight_of(codes, zeros, scales, g_idx)
        module.weight.copy_(weight.T if conv else weight)
        del tensors[f"{key}.weight"]
        tensors |= {f"{key}.{part}": t for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, quantization_config=config)
    return network


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same_logits(model, expected):
    """With gradients on, a quantized layer computes in float32 with its weight as it is."""
    logits = model(TOKENS)
    assert logits.requires_grad
    with torch.no_grad():
        baseline = expected(TOKENS).logits
        assert_accurate(logits, expected.double()(TOKENS).logits, baseline)


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, (QuantLinear, JoinedLinear))}


ALL = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}


@pytest.mark.parametrize("name", FORMATS)
def test_folders_are_kept_quantized(tmp_path, name):
    expected = save_quantized(tmp_path, name)
    model, _ = load(tmp_path)
    assert quantized_names(model) == ALL
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    numbers_ = load(tmp_path, quantized="dequantize")[0]
    assert quantized_names(numbers_) == set()
    for layer in ALL:
        kept = model.get_submodule(layer).quantized.dequantize()
        # dequantized to the scales' float16 first, as the checkpoint's numbers
        assert torch.equal(kept.half().float(), numbers_.get_submodule(layer).weight)
    assert_same_logits(model, expected)


@pytest.mark.parametrize("name", ["gptq", "gptq_act_order"])
def test_transposed_weights_of_gpt2(tmp_path, name):
    expected = save_quantized(tmp_path, name, "gpt2")
    model, _ = load(tmp_path)
    assert quantized_names(model) == ALL
    assert_same_logits(model, expected)


def test_parts_in_different_orders_stay_apart(tmp_path):
    expected = save_quantized(tmp_path / "model", "gptq_act_order", "qwen2", same_order=False)
    model, _ = load(tmp_path / "model")
    qkv = model.blocks[0].attn.qkv
    assert isinstance(qkv, JoinedLinear)
    assert [part.out_features for part in qkv.parts] == [32, 16, 16]
    assert qkv.bias is not None
    save(model, None, tmp_path / "saved")
    again = load(tmp_path / "saved")[0]
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert_same_logits(model, expected)


def test_biases_of_zeros_that_the_model_does_not_have(tmp_path):
    expected = save_quantized(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(32)}, file)
    assert_same_logits(load(tmp_path)[0], expected)
    save_file(tensors | {name: torch.ones(32)}, file)
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name!r}"):
        load(tmp_path)


DOWN = "model.layers.1.mlp.down_proj"


def change(**config):
    return lambda folder: set_config(
        folder, quantization_config=json.loads((folder / "config.json").read_text())["quantization_config"] | config
    )


def edit(edit_tensors):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gptq", change(bits=3), r"config.json: quantization_config.bits = 3 is not supported \(only 4, 8\)"),
        ("gptq", change(bits=8), r"g_idx' has shape \(48,\), but 8 bits with group_size 16 .* need \(24,\)"),
        ("gptq", change(group_size=32), r"qzeros' has shape \(3, 4\), but 4 bits with group_size 32 .* need \(2, 4\)"),
        ("gptq", change(group_size=8), r"group_size = 8 is not supported \(only -1 and 16 to 1024\)"),
        ("gptq", change(checkpoint_format="marlin"), r"checkpoint_format = 'marlin' is not supported"),
        ("gptq", change(checkpoint_format="gptq_v2"), r"hold a zero point of 7, but a symmetric weight has 8"),
        ("gptq", change(dynamic={"-:.*": {}}), r"quantization_config.dynamic = .* is not supported"),
        ("gptq_asymmetric", change(sym=True), r"does not agree with quantization_config: qzeros of .* a symmetric"),
        ("gptq_act_order", change(desc_act=False), r"does not agree with .*: the order of its groups \(g_idx\)"),
        ("gptq", change(quant_method="awq", version="gemm"), r"qzeros' has shape \(3, 4\), .* need \(1, 32\)"),
        ("gptq", edit(lambda t: t.pop(f"{DOWN}.scales")), rf"tensor '{DOWN}.scales' is missing beside '{DOWN}"),
        (
            "gptq",
            edit(lambda t: t.update({f"{DOWN}.g_idx": torch.zeros(48, dtype=torch.int32)})),
            rf"{DOWN} does not agree with quantization_config: group_index of {DOWN} must give every group 16",
        ),
        (
            "gptq",
            edit(lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:4]})),
            rf"tensor '{DOWN}.g_idx' has shape \(48,\), but 4 bits .* need \(32,\) for a weight \(32, 32\)",
        ),
        (
            "gptq",
            edit(lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"] * torch.inf})),
            rf"{DOWN} does not agree with quantization_config: scales of {DOWN} have NaN or infinite values",
        ),
        ("awq", change(version="gemv"), r"quantization_config.version = 'gemv' is not supported"),
        ("awq", change(bits=8), r"quantization_config.bits = 8 is not supported \(only 4\)"),
        ("compressed", change(format="float-quantized"), r"format = 'float-quantized' is not supported"),
        ("compressed", change(config_groups={}), r"config_groups has 0 different kinds"),
        ("compressed", change(config_groups=None), r"config_groups = None: an object is needed"),
        (
            "compressed",
            change(config_groups={"a": {"input_activations": {"num_bits": 8}, "weights": {}}}),
            r"config_groups.a.input_activations = .* is not supported",
        ),
        (
            "compressed",
            edit(lambda t: t.pop(f"{DOWN}.weight_zero_point")),
            rf"tensor '{DOWN}.weight_zero_point' is missing, and quantization_config says symmetric = False",
        ),
        (
            "compressed",
            edit(lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([32, 64])})),
            rf"tensor '{DOWN}.weight_packed' has shape \(32, 6\), but .* need \(32, 8\)",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_contradict_themselves(tmp_path, name, damage, message):
    save_quantized(tmp_path, name)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_configuration_without_quantized_tensors_and_the_reverse(tmp_path):
    make().save_pretrained(tmp_path / "plain")
    set_config(tmp_path / "plain", quantization_config=FORMATS["gptq"])
    with pytest.raises(CheckpointError, match=r"says gptq, but no tensor has a name that ends with .qweight"):
        load(tmp_path / "plain")
    save_quantized(tmp_path / "quantized", "gptq")
    set_config(tmp_path / "quantized", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"proj.g_idx' is of a quantized weight, .* no quantization_config"):
        load(tmp_path / "quantized")


# ---- GGUF files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_gguf_files_are_kept_quantized(tmp_path, name, kind):
    expected = make(name, **({"n_embd": 64} if name == "gpt2" else WIDE))
    write_gguf(tmp_path / "model.gguf", expected, GGML[kind])
    model, _ = load(tmp_path / "model.gguf")
    numbers_, _ = load(tmp_path / "model.gguf", quantized="dequantize")
    assert quantized_names(model) - {"head", "embed.table", "positions.table"} == ALL
    for layer in ALL | {"head"}:
        kept, plain = model.get_submodule(layer), numbers_.get_submodule(layer)
        assert torch.equal(kept.quantized.dequantize(), plain.weight)
        assert (kept.bias is None) == (plain.bias is None)
    assert isinstance(model.embed, QuantEmbedding)
    assert torch.equal(model.embed(TOKENS), numbers_.embed(TOKENS))
    assert (model.embed.table is model.head) == model.config.tie_embeddings
    save(model, None, tmp_path / "saved")
    again = load(tmp_path / "saved")[0]
    assert (again.embed.table is again.head) == model.config.tie_embeddings
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
        assert_accurate(again(TOKENS[:, :5]), numbers_(TOKENS[:, :5]).double(), half_weights(numbers_)(TOKENS[:, :5]))


def half_weights(model):
    """The same model with its matrices rounded to float16, which is what a CPU computes several rows with."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.half().float()
    return model


def test_gguf_files_of_mixed_types(tmp_path):
    """Parts of a fused matrix in different types: layers of their own; a type that isn't kept makes all its numbers."""

    def kind(name):
        if "attn_q" in name or "ffn_down" in name:
            return GGML.Q4_0
        return GGML.Q6_K if "ffn_up" in name else GGML.Q8_0

    expected = make(**WIDE)
    write_gguf(tmp_path / "model.gguf", expected, kind)
    model, _ = load(tmp_path / "model.gguf")
    block = model.blocks[0]
    assert [part.format for part in block.attn.qkv.parts] == ["int4", "int8", "int8"]
    assert block.mlp.down.format == "int4"
    assert not isinstance(block.mlp.up, QuantLinear)
    requantized, _ = load(tmp_path / "model.gguf", quantized="requantize")
    gate, up = requantized.blocks[0].mlp.up.parts  # float16 scales as stored, and float32 ones
    assert gate.format == "int8"
    assert (up.format, up.group_size) == ("int8", 32)
    plain = block.mlp.up.weight[WIDE["intermediate_size"] :]
    step = plain.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127.5
    error = (up.quantized.dequantize() - plain).unflatten(1, (-1, 32)).abs()
    assert error.max() > 0
    assert bool((error <= (0.5 + 127.5 * 2**-23) * step).all())  # half a step, and the scale's own rounding
    assert_same_logits(model, expected)


def test_the_keyword_has_three_values(tmp_path):
    with pytest.raises(ValueError, match="quantized is 'int4'; allowed are 'keep', 'requantize', 'dequantize'"):
        load(tmp_path, quantized="int4")
