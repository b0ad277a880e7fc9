"""QuantLinear and LoRALinear: what modules are expected to survive, gradients, adapters."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lmops.models import GPT, GPTConfig
from lmops.modules import LoRALinear, QuantLinear
from lmops.ops.linear_loss import linear_cross_entropy
from lmops.quantization import QuantizedTensor, quantize_model
from lmops.testing import assert_accurate

LAYOUTS = {
    "int4": {"bits": 4, "group_size": 32},
    "int4 zeros": {"bits": 4, "group_size": 16, "symmetric": False},
    "int8 row": {"bits": 8, "group_size": -1},
    "fp8": {"bits": 8, "group_size": -1, "fp8": True},
}
LLAMA = GPTConfig(
    61, 32, 2, 4, 32, n_kv_heads=2, norm="rmsnorm", activation="silu", gated_mlp=True, positions="rope", bias=False
)


def make(layout="int4", n_in=80, n_out=24, bias=True, dtype=torch.float32):
    return QuantLinear.from_float(nn.Linear(n_in, n_out, bias, dtype=dtype), **LAYOUTS[layout])


@pytest.fixture(params=LAYOUTS)
def layer(request):
    return make(request.param)


def test_computes_with_the_dequantized_weight(layer):
    x = torch.randn(2, 5, 80)
    w = layer.quantized.dequantize(torch.float64)
    truth = F.linear(x.double(), w, layer.bias.double())
    y = layer(x)
    assert_accurate(y, truth, F.linear(x, w.float(), layer.bias))
    assert_accurate(layer.dequantize()(x), truth, F.linear(x, w.float(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_type_of_x(layer, dtype):
    x = torch.randn(3, 80, dtype=dtype)
    w = layer.quantized.dequantize(torch.float64)
    truth = F.linear(x.double(), w, layer.bias.double())
    y = layer(x)
    assert y.dtype == dtype
    assert_accurate(y, truth, F.linear(x, w.to(dtype), layer.bias.to(dtype)))


def test_gradients_reach_x_and_bias(layer):
    x = torch.randn(4, 80, requires_grad=True)
    dy = torch.randn(4, 24)
    layer(x).backward(dy)
    w = layer.quantized.dequantize(torch.float64)
    assert_accurate(x.grad, dy.double() @ w, dy @ w.float())
    assert_accurate(layer.bias.grad, dy.double().sum(0), dy.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_looks_like_a_linear_layer(layer):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (80, 24)
    w = layer.weight
    assert (w.shape, w.dtype, w.device.type, w.requires_grad) == ((24, 80), torch.float32, "cpu", False)
    assert torch.equal(w + 0, layer.quantized.dequantize())
    x = torch.randn(3, 80, requires_grad=True)
    F.linear(x, w).sum().backward()
    assert_accurate(x.grad, (w + 0).double().sum(0).expand(3, -1), torch.ones(3, 24) @ (w + 0))


@pytest.mark.parametrize("write", ["zero_", "data", "init", "out"])
def test_writing_to_the_weight_is_an_error_and_not_lost(write):
    layer = make()
    attempts = {
        "zero_": lambda: layer.weight.zero_(),
        "data": lambda: layer.weight.data.add_(1),  # as adapters are merged
        "init": lambda: nn.init.normal_(layer.weight),
        "out": lambda: torch.add(torch.zeros(24, 80), 1, out=layer.weight),
    }
    with pytest.raises(RuntimeError, match=r"cannot be written to.*dequantize\(\)"):
        attempts[write]()


# ---- state --------------------------------------------------------------------------------------------------------


def equal(a, b, x=None):
    x = torch.randn(3, 80) if x is None else x
    return torch.equal(a(x), b(x)) and torch.equal(a.quantized.codes().float(), b.quantized.codes().float())


@torch.no_grad()
def test_copies(layer):
    x = torch.randn(3, 80)
    layer(x)  # makes what a CPU keeps
    assert equal(copy.deepcopy(layer), layer)
    assert equal(pickle.loads(pickle.dumps(layer)), layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=False), layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_takes_the_format_along(layout, bias, tmp_path):
    layer = make(layout, bias=bias)
    save_file(layer.state_dict(), tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    for other in ("int4", "int8 row"):
        target = make(other, bias=bias)
        with torch.no_grad():
            target(torch.randn(1, 80))  # what a CPU keeps of the old weight must go
        target.load_state_dict(state)
        assert equal(target, layer)
    empty = QuantLinear(80, 24, bias, device="meta")
    assert empty.packed.is_meta
    empty.load_state_dict(state, assign=True)
    assert equal(empty, layer)
    assert empty.packed.data_ptr() == state["packed"].data_ptr()


def test_loading_in_place_keeps_the_memory():
    layer, other = make(), make()
    before = layer.packed
    layer.load_state_dict(other.state_dict())
    assert layer.packed is before
    assert equal(layer, other)


def test_loading_what_does_not_fit_names_the_layer():
    model = nn.Sequential(make())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"0\.info.*\(24, 80\).*\(24, 64\)"):
        nn.Sequential(make(n_in=64)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"packed of 0 must be"):
        model.load_state_dict({**state, "0.packed": state["0.packed"][:, :5]})
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.packed.*0\.scales.*0\.info"):
        model.load_state_dict({"0.bias": state["0.bias"]})
    with pytest.raises(RuntimeError, match=r"of 0: missing \['info'\]"):
        model.load_state_dict({name: t for name, t in state.items() if name != "0.info"})
    assert model.load_state_dict({"0.bias": state["0.bias"]}, strict=False).missing_keys


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_cast_leaves_the_scales_alone(layer, cast):
    before = layer.quantized.dequantize()
    dtype = cast(nn.Linear(1, 1)).weight.dtype
    cast(layer)
    assert layer.scales.dtype == torch.float32
    assert layer.packed.dtype == torch.int16
    assert (layer.bias.dtype, layer.weight.dtype, layer.dequantize().weight.dtype) == (dtype, dtype, dtype)
    assert torch.equal(layer.quantized.dequantize(), before)
    assert layer(torch.randn(2, 80, dtype=dtype)).dtype == dtype


def test_meta_device_and_back(layer):
    moved = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta", "cpu"}  # info says what it was
    assert moved(torch.empty(5, 80, device="meta")).shape == (5, 24)
    back = moved.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert equal(back, layer)


def test_a_move_forgets_what_the_cpu_kept():
    layer = make()
    x = torch.randn(1, 80)
    with torch.no_grad():
        before = layer(x)
        layer._apply(lambda t: torch.zeros_like(t))
        assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), torch.zeros(1, 24))


def test_autocast():
    layer = make()
    x = torch.randn(3, 80)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16()))


def test_compiles_without_graph_breaks():
    layer = make()
    x = torch.randn(3, 80, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    y2 = layer(x)
    assert torch.equal(y, y2)
    assert torch.equal(dx, torch.autograd.grad(y2.sum(), x)[0])


def test_no_rows_and_many_dimensions(layer):
    assert layer(torch.randn(0, 80)).shape == (0, 24)
    assert layer(torch.randn(2, 1, 3, 80)).shape == (2, 1, 3, 24)
    assert layer(torch.randn(80)).shape == (24,)
    x = torch.randn(80, 6).T
    assert_accurate(layer(x), layer(x.contiguous()).double(), layer(x.contiguous()))


def test_bad_arguments():
    weight = make().quantized
    with pytest.raises(ValueError, match=r"bias must be \(24,\)"):
        QuantLinear.from_quantized(weight, torch.zeros(23))
    with pytest.raises(ValueError, match="bias must be on cpu"):
        QuantLinear.from_quantized(weight, torch.zeros(24, device="meta"))
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        QuantLinear.from_float(nn.Linear(32, 4), bits=3)
    with pytest.raises(ValueError, match=r"group_size of a\.b must be at most the 32 columns"):
        QuantLinear.from_float(nn.Linear(32, 4), group_size=64, name="a.b")
    with pytest.raises(ValueError, match="x must be"):
        make()(torch.randn(3, 79))
    with pytest.raises(RuntimeError, match="no initial weights"):
        make().reset_parameters()


# ---- in our model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [("head",), ()])
def test_in_a_gpt_with_tied_embeddings(skip):
    model = GPT(LLAMA).eval()
    names = quantize_model(model, 8, 16, skip=skip, progress=False)
    assert ("head" in names) == (not skip)
    assert (model.head.weight is model.embed.weight) == bool(skip)
    tokens = torch.randint(0, 61, (2, 9))
    float_model = copy.deepcopy(model)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(float_model.get_submodule(parent), attribute, model.get_submodule(name).dequantize())
    float_model.config = model.config
    truth = copy.deepcopy(float_model).double()(tokens)
    assert_accurate(model(tokens), truth, float_model(tokens))  # with gradients: in float32 throughout
    # the loss reads the head's weight, not its output
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model(tokens, tokens), loss)
    model(tokens, tokens).backward()
    assert model.embed.weight.grad is not None
    model.to(torch.bfloat16)
    assert model(tokens).dtype == torch.bfloat16
    assert model.blocks[0].mlp.up.scales.dtype == torch.float32


# ---- LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_learn_and_the_base_stays(quantized):
    model = GPT(LLAMA)
    model.embed.weight.data.mul_(20)  # and the tied head's, which as it starts could tell no tokens apart
    if quantized:
        quantize_model(model, 4, 16, progress=False)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank=4, alpha=8)
        block.mlp.down = LoRALinear(block.mlp.down, rank=4, alpha=8)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"a", "b"}
    tokens = torch.randint(0, 61, (4, 16))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(trained)


def test_an_adapter_starts_at_the_base_and_adds_what_the_formula_says():
    for base in (nn.Linear(80, 24), make()):
        lora = LoRALinear(base, rank=3, alpha=6, dropout=0.5)
        x = torch.randn(5, 80)
        assert torch.equal(lora(x), base(x))
        nn.init.normal_(lora.b)
        lora.eval()
        w = base.weight + 2 * lora.b @ lora.a
        truth = F.linear(x.double(), w.detach().double(), base.bias.double())
        # without a gradient a quantized layer's weight is rounded to float16 on a CPU
        rounded = base.weight.half() + 2 * lora.b @ lora.a if isinstance(base, QuantLinear) else w
        assert_accurate(lora(x), truth, F.linear(x, rounded, base.bias))
        assert not torch.equal(lora.train()(x), lora.eval()(x))  # dropout
        if isinstance(base, QuantLinear):
            with pytest.raises(TypeError, match=r"base is quantized.*dequantize\(\)"):
                lora.merge()
            lora.base = base.dequantize()
        merged = lora.merge()
        assert type(merged) is nn.Linear
        assert_accurate(merged(x), truth, F.linear(x, w, base.bias))


def test_adapters_in_half_precision_keep_float32_parameters():
    lora = LoRALinear(make(dtype=torch.bfloat16), rank=2)
    assert lora.a.dtype == lora.b.dtype == torch.float32
    assert lora(torch.randn(3, 80, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_adapters():
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Linear, got Conv1d"):
        LoRALinear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="rank is 9; it must be between 1 and 8"):
        LoRALinear(nn.Linear(8, 16), rank=9)
    with pytest.raises(ValueError, match="dropout is 1"):
        LoRALinear(nn.Linear(8, 16), rank=2, dropout=1.0)


def test_sharing_with_a_quantized_tensor():
    weight = QuantizedTensor.quantize(torch.randn(24, 80), 4, 16)
    layer = QuantLinear.from_quantized(weight)
    assert layer.packed is weight.packed
    assert layer.bias is None
    assert layer.weight.dtype == weight.scales.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_head_gives_the_loss_of_its_dequantized_weight(layout):
    """And the gradient of what comes into it; the codes have none."""
    head = make(layout, n_in=80, n_out=300, bias=False)
    weight = head.quantized.dequantize(torch.float32)
    hidden = torch.randn(5, 80, requires_grad=True)
    targets = torch.tensor([0, 7, -100, 299, 150])
    loss = linear_cross_entropy(hidden, head.weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])
