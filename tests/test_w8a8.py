"""SmoothQuant: W8A8Linear with scales that go from x to the weight, and the conversion of models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lmops.models.gpt import GPT, GPTConfig
from lmops.models.saved import load_saved, save
from lmops.quantization import QuantizedTensor, QuantLinear, W8A8Linear, smooth_quantize
from lmops.reference.quantization import quantize_rows
from lmops.testing import assert_accurate


def outliers(*shape):
    """x with a few columns far larger than the others, as activations of large models have."""
    x = torch.randn(*shape)
    x[..., ::17] *= 100
    return x


def made(n_in=96, n_out=40, alpha=0.5):
    linear, x = nn.Linear(n_in, n_out), outliers(64, n_in)
    with torch.no_grad():
        linear.weight[:, ::17] /= 100
    return linear, x, W8A8Linear.smoothed(linear, x.abs().amax(0), alpha)


@torch.no_grad()
def test_scales_are_the_papers():
    linear, x, layer = made(alpha=0.3)
    for j in (0, 1, 17, 95):
        wanted = x[:, j].abs().max() ** 0.3 / linear.weight[:, j].abs().max() ** 0.7
        torch.testing.assert_close(layer.smooth[j], wanted)
    magnitude = torch.ones(96)
    magnitude[3] = 0
    linear.weight[:, 5] = 0
    smooth = W8A8Linear.smoothed(linear, magnitude).smooth
    assert smooth[3] == smooth[5] == 1


@torch.no_grad()
def test_the_scales_cancel_in_the_product():
    """Codes of x / s times codes of W s; what is lost is a small part of what plain rows lose to the large columns."""
    linear, x, layer = made()
    s = x.abs().amax(0).double().sqrt() / linear.weight.double().abs().amax(0).sqrt()
    packed = QuantizedTensor.quantize((linear.weight * s).float(), 8)
    codes, scales = quantize_rows((x / s).float(), "int8")
    truth = (codes.double() * scales.double()) @ packed.dequantize(torch.float64).T + linear.bias.double()
    assert_accurate(layer(x), truth, truth.float())
    exact = linear.double()(x.double())
    plain = W8A8Linear.from_float(linear.float(), 8, -1)
    assert plain.smooth is None
    assert (layer(x) - exact).norm() < 0.2 * (plain(x) - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True])
def test_calls_on_a_cpu_keep_the_codes(monkeypatch, fp8):
    """In the order of the weight; results are those of the operator, also after the weight has been changed."""
    linear, x = nn.Linear(96, 40), outliers(5, 96)
    layer = W8A8Linear.from_float(linear, 8, -1, fp8=fp8)
    first = layer(x)
    monkeypatch.setattr("lmops.quantization.w8a8.int8_matmul", None)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x[0]), first[0])
    monkeypatch.undo()
    assert pickle.loads(pickle.dumps(layer))._cpu_weight is None
    other = W8A8Linear.from_float(nn.Linear(96, 40), 8, -1, fp8=fp8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 96\)"):
        layer(x[:, :8])


@torch.no_grad()
def test_weight_is_the_layers_own():
    linear, _, layer = made()
    packed = QuantizedTensor.quantize(linear.weight * layer.smooth, 8)
    assert torch.equal(layer.weight + 0, packed.dequantize() / layer.smooth)
    assert torch.equal(layer.dequantize().weight, layer.weight + 0)
    # what would compute with the packed weight alone is told that it is not all
    assert getattr(layer.weight, "quantized", None) is None
    assert isinstance(W8A8Linear.from_float(linear, 8, -1).weight.quantized, QuantizedTensor)


def test_gradient():
    _, x, layer = made()
    x.requires_grad_()
    dy = torch.randn(64, 40)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    weight = layer.weight.double()
    assert_accurate(dx, dy.double() @ weight, dy @ weight.float())


@torch.no_grad()
def test_copies_and_states():
    linear, x, layer = made()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = W8A8Linear.from_float(nn.Linear(96, 40), 8, -1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    plain = W8A8Linear.from_float(linear, 8, -1)
    other.load_state_dict(plain.state_dict())
    assert other.smooth is None
    assert torch.equal(other(x), plain(x))
    assert layer.bfloat16().smooth.dtype == torch.float32


def model():
    config = GPTConfig(
        vocab_size=61, context_length=48, n_layers=2, n_heads=4, d_model=32, norm="rmsnorm", tie_embeddings=False
    )
    return GPT(config).eval()


@torch.no_grad()
def test_a_model(tmp_path):
    torch.manual_seed(0)
    gpt = model()
    for block in gpt.blocks:
        block.mlp_norm.weight[::9] = 100.0
        block.mlp.up.weight[:, ::9] /= 100
    plain, tokens = copy.deepcopy(gpt), torch.randint(61, (2, 20))
    expected = gpt(tokens)
    names = smooth_quantize(gpt, [tokens])
    assert names == [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
    assert all(type(gpt.get_submodule(name)) is W8A8Linear for name in names)
    assert type(gpt.head) is not W8A8Linear
    for name in names:
        layer = plain.get_submodule(name)
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, W8A8Linear.from_float(layer, 8, -1))
    error = (gpt(tokens) - expected).norm()
    assert error < 0.5 * (plain(tokens) - expected).norm()
    save(gpt, None, tmp_path / "model")
    again = load_saved(tmp_path / "model", None, "cpu")
    assert torch.equal(again(tokens), gpt(tokens))
    assert not isinstance(again.head, QuantLinear)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x.float()[..., None].expand(*x.shape, 8))


def test_a_layer_that_calibration_does_not_reach_is_not_smoothed():
    branch = Branch()
    smooth_quantize(branch, [torch.arange(1, 9)])
    assert torch.equal(branch.unused.smooth, torch.ones(8))
    assert not torch.equal(branch.used.smooth, torch.ones(8))


@pytest.mark.parametrize(
    ("calibration", "options", "error", "message"),
    [
        (None, {}, ValueError, "calibration is missing"),
        ([], {}, ValueError, "calibration has no tokens"),
        ([torch.ones(3)], {}, TypeError, "calibration must be batches of tokens"),
        ([torch.ones(3, dtype=torch.int64)], {"alpha": 2}, ValueError, "alpha must be from 0 to 1, got 2"),
        ([torch.ones(3, dtype=torch.int64)], {"skip": "head"}, TypeError, "skip must be a list of names"),
    ],
)
def test_bad_input_leaves_the_model(calibration, options, error, message):
    gpt = model()
    with pytest.raises(error, match=message):
        smooth_quantize(gpt, calibration, **options)
    assert not any(isinstance(module, QuantLinear) for module in gpt.modules())


def test_nan_in_the_inputs_leaves_the_model():
    gpt = model()
    with torch.no_grad():
        gpt.blocks[1].mlp_norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"the calibration inputs of blocks.1.mlp.up have NaN or infinite values"):
        smooth_quantize(gpt, [torch.ones(3, dtype=torch.int64)])
    assert not any(isinstance(module, QuantLinear) for module in gpt.modules())
    with pytest.raises(ValueError, match=r"magnitude must be \(8,\), got \(7,\)"):
        W8A8Linear.smoothed(nn.Linear(8, 3), torch.ones(7))
