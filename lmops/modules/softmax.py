"""Drop-in modules for torch.nn.Softmax and torch.nn.LogSoftmax, with a temperature and a causal mask."""

from __future__ import annotations

from torch import Tensor, nn

from lmops.ops.softmax import log_softmax, softmax


class Softmax(nn.Module):
    """Takes the place of `torch.nn.Softmax(dim)`; computes `lmops.softmax(x, temperature, dim, causal=causal)`.

    temperature: a number, a tensor of one value a row, or an `nn.Parameter` to learn. dim=None chooses as torch does:
    0 for inputs of 0, 1 or 3 dimensions, otherwise 1.
    """

    function = staticmethod(softmax)

    def __init__(self, dim: int | None = None, *, temperature: float | Tensor = 1.0, causal: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        dim = self.dim if self.dim is not None else 0 if x.ndim in (0, 1, 3) else 1
        return self.function(x, self.temperature, dim, causal=self.causal)

    def extra_repr(self) -> str:
        temperature = "learned" if isinstance(self.temperature, nn.Parameter) else self.temperature
        return f"dim={self.dim}, temperature={temperature}, causal={self.causal}"


class LogSoftmax(Softmax):
    """Takes the place of `torch.nn.LogSoftmax(dim)`; arguments as for `Softmax`."""

    function = staticmethod(log_softmax)
