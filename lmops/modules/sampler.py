"""A module that holds the parameters of `lmops.sample`."""

from __future__ import annotations

from torch import Tensor, nn

from lmops.ops.sampling import PARAMETERS, Sample, sample


class Sampler(nn.Module):
    """`lmops.sample` with the parameters of a model or a service; what changes from call to call goes to `forward`.

    Parameters are numbers, or tensors of one value a row, which move with the module; all are as in `lmops.sample`,
    which also checks them.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        repetition_penalty: float | Tensor = 1.0,
        presence_penalty: float | Tensor = 0.0,
        frequency_penalty: float | Tensor = 0.0,
        logit_bias: Tensor | None = None,
        return_logprobs: int = 0,
    ) -> None:
        super().__init__()
        values = (
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias
        )  # fmt: skip
        for name, value in zip((*PARAMETERS, "logit_bias"), values, strict=True):
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.return_logprobs = return_logprobs

    def forward(
        self,
        logits: Tensor,
        *,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        token_counts: Tensor | None = None,
        allowed_mask: Tensor | None = None,
    ) -> Sample:
        """A token a row of logits (B, V); arguments and result as in `lmops.sample`."""
        parameters = {name: getattr(self, name) for name in (*PARAMETERS, "logit_bias")}
        return sample(
            logits,
            seed=seed,
            offset=offset,
            token_counts=token_counts,
            allowed_mask=allowed_mask,
            return_logprobs=self.return_logprobs,
            **parameters,
        )

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in PARAMETERS}
        shown = {n: f"a row, {tuple(v.shape)}" if isinstance(v, Tensor) else v for n, v in values.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
