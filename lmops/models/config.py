"""`GPTConfig`: the choices that make a `GPT` a GPT-2, a GPT-3, a Llama, a Mistral or a Qwen, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Positions = Literal["learned", "sinusoidal", "rope", "none"]
Scaling = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]


def _check_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched for contexts longer than the `original_context_length` of the pretraining.

    linear: every frequency divided by `factor` (kaiokendev 2023).
    dynamic: the base grows with the sequence's present length once it exceeds the original (NTK-aware, bloc97 2023).
    llama3: low frequencies divided by `factor`, high ones kept, a ramp between them (Llama 3.1).
    yarn: the same idea with a ramp counted in rotations (arXiv 2309.00071); cos and sin times `attention_factor`.
    longrope: one searched divisor a frequency, `short_factor` up to the original length and `long_factor` beyond it
        (arXiv 2402.13753); cos and sin times `attention_factor`.

    With dynamic and longrope each row of a batch is stretched for its own length, not for its longest neighbour's;
    keys in a cache keep the rotation of the length that they were written at.
    `attention_factor` None is the value that the paper recommends for `factor`.
    """

    kind: Scaling
    factor: float = 1.0
    original_context_length: int | None = None
    attention_factor: float | None = None  # yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope: rope_dim / 2 divisors each
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("RopeScaling.kind", self.kind, Scaling)
        if not self.factor >= 1:
            raise ValueError(f"RopeScaling.factor is {self.factor}; it must be at least 1")
        if self.kind != "linear" and not self.original_context_length:
            raise ValueError(f"RopeScaling.original_context_length is missing; kind={self.kind!r} needs it")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`. The defaults are GPT-2's choices; only the sizes must be given.

    Fields that are None take the value in their comment when the configuration is made (and keep it in
    `dataclasses.replace`). `bias` is that of the attention output, the MLP and LayerNorm; `qkv_bias` of the QKV matrix.
    Raises ValueError for a combination without meaning.
    """

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    d_model: int
    n_kv_heads: int = None  # type: ignore[assignment]  # n_heads
    head_dim: int = None  # type: ignore[assignment]  # d_model // n_heads
    d_ff: int = None  # type: ignore[assignment]  # 4 * d_model

    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False  # down(activation(gate(x)) * up(x)); with silu this is SwiGLU (arXiv 2002.05202)

    positions: Positions = "learned"
    rope_base: float = 10000.0
    rope_dim: int = None  # type: ignore[assignment]  # head_dim; less rotates only the first rope_dim dimensions
    rope_scaling: RopeScaling | None = None
    attention_window: int | None = None  # each token sees itself and the window - 1 tokens before it (Mistral)

    bias: bool = True
    qkv_bias: bool = None  # type: ignore[assignment]  # bias
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE (Qwen3)
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        def default(name: str, value: object) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("n_kv_heads", self.n_heads)
        if self.head_dim is None and self.n_heads > 0 and self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}; without head_dim, n_heads={self.n_heads} must divide it")
        default("head_dim", self.d_model // max(self.n_heads, 1))
        default("d_ff", 4 * self.d_model)
        default("rope_dim", self.head_dim)
        default("qkv_bias", self.bias)

        sizes = ("vocab_size", "context_length", "n_layers", "n_heads", "d_model", "n_kv_heads", "head_dim", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _check_choice("norm", self.norm, Norm)
        _check_choice("activation", self.activation, Activation)
        _check_choice("positions", self.positions, Positions)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads={self.n_heads}")
        if self.positions == "rope" and (self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim):
            raise ValueError(f"rope_dim is {self.rope_dim}; it must be even and between 2 and head_dim={self.head_dim}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model is {self.d_model}; sinusoidal positions need an even one")
        if self.rope_scaling is not None:
            if self.positions != "rope":
                raise ValueError(f"rope_scaling is set, but positions is {self.positions!r}; it must be 'rope'")
            if self.rope_scaling.kind == "longrope":
                for name in ("short_factor", "long_factor"):
                    found, needed = len(getattr(self.rope_scaling, name)), self.rope_dim // 2
                    if found != needed:
                        raise ValueError(f"RopeScaling.{name} has {found} values; it must have rope_dim / 2 = {needed}")
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(f"attention_window is {self.attention_window}; it must be at least 1, or None")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    # GPT-2 (Radford et al. 2019) and GPT-3 (arXiv 2005.14165, table 2.1): one architecture. Two rows of that table
    # contradict themselves (24 heads of 128 are not d_model 2048, 40 heads of 128 are not 5140); 16 heads and 5120
    # agree with the sizes 1.3B and 13B that it states. OpenAI's GPT-3 has sparse attention in every second layer, which
    # changes no weight; all layers are dense here.

    @classmethod
    def _gpt(cls, n_layers: int, n_heads: int, d_model: int, context: int) -> GPTConfig:
        return cls(vocab_size=50257, context_length=context, n_layers=n_layers, n_heads=n_heads, d_model=d_model)

    @classmethod
    def gpt2(cls) -> GPTConfig:
        """124M parameters."""
        return cls._gpt(12, 12, 768, context=1024)

    @classmethod
    def gpt2_medium(cls) -> GPTConfig:
        """355M parameters."""
        return cls._gpt(24, 16, 1024, context=1024)

    @classmethod
    def gpt2_large(cls) -> GPTConfig:
        """774M parameters."""
        return cls._gpt(36, 20, 1280, context=1024)

    @classmethod
    def gpt2_xl(cls) -> GPTConfig:
        """1.56B parameters."""
        return cls._gpt(48, 25, 1600, context=1024)

    @classmethod
    def gpt3_small(cls) -> GPTConfig:
        """125M parameters."""
        return cls._gpt(12, 12, 768, context=2048)

    @classmethod
    def gpt3_medium(cls) -> GPTConfig:
        """350M parameters."""
        return cls._gpt(24, 16, 1024, context=2048)

    @classmethod
    def gpt3_large(cls) -> GPTConfig:
        """760M parameters."""
        return cls._gpt(24, 16, 1536, context=2048)

    @classmethod
    def gpt3_xl(cls) -> GPTConfig:
        """1.3B parameters."""
        return cls._gpt(24, 16, 2048, context=2048)

    @classmethod
    def gpt3_2_7b(cls) -> GPTConfig:
        """2.7B parameters."""
        return cls._gpt(32, 32, 2560, context=2048)

    @classmethod
    def gpt3_6_7b(cls) -> GPTConfig:
        """6.7B parameters."""
        return cls._gpt(32, 32, 4096, context=2048)

    @classmethod
    def gpt3_13b(cls) -> GPTConfig:
        """13B parameters."""
        return cls._gpt(40, 40, 5120, context=2048)

    @classmethod
    def gpt3_175b(cls) -> GPTConfig:
        """175B parameters: GPT-3."""
        return cls._gpt(96, 96, 12288, context=2048)

    @classmethod
    def _llama(
        cls, vocab_size: int, context: int, n_layers: int, d_model: int, d_ff: int, heads: tuple[int, int], **more: Any
    ) -> GPTConfig:
        llama = {"norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "positions": "rope", "bias": False}
        sizes = {"n_kv_heads": heads[1], "d_ff": d_ff}
        return cls(
            vocab_size, context, n_layers, heads[0], d_model, **{**sizes, **llama, "tie_embeddings": False, **more}
        )

    @classmethod
    def llama3_8b(cls) -> GPTConfig:
        """Llama 3 8B (arXiv 2407.21783)."""
        return cls._llama(128256, 8192, 32, 4096, 14336, heads=(32, 8), rope_base=500000.0)

    @classmethod
    def llama3_1_8b(cls) -> GPTConfig:
        """Llama 3.1 8B: the weights' shapes of Llama 3, 128K tokens of context by scaled RoPE."""
        scaling = RopeScaling("llama3", factor=8.0, original_context_length=8192)
        return cls._llama(128256, 131072, 32, 4096, 14336, heads=(32, 8), rope_base=500000.0, rope_scaling=scaling)

    @classmethod
    def mistral_7b(cls) -> GPTConfig:
        """Mistral 7B v0.1: a sliding window of 4096 (arXiv 2310.06825)."""
        return cls._llama(32000, 32768, 32, 4096, 14336, heads=(32, 8), attention_window=4096)

    @classmethod
    def qwen2_5_0_5b(cls) -> GPTConfig:
        """Qwen2.5 0.5B: biases on QKV, tied (arXiv 2412.15115)."""
        qwen: dict[str, Any] = {"rope_base": 1000000.0, "norm_eps": 1e-6, "tie_embeddings": True}
        return cls._llama(151936, 32768, 24, 896, 4864, heads=(14, 2), qkv_bias=True, **qwen)

    @classmethod
    def qwen3_0_6b(cls) -> GPTConfig:
        """Qwen3 0.6B: norms on query and key heads, heads wider than d_model / n_heads (arXiv 2505.09388)."""
        qwen: dict[str, Any] = {"rope_base": 1000000.0, "norm_eps": 1e-6, "tie_embeddings": True}
        return cls._llama(151936, 40960, 28, 1024, 3072, heads=(16, 8), head_dim=128, qk_norm=True, **qwen)

    @classmethod
    def smollm2_135m(cls) -> GPTConfig:
        """SmolLM2 135M (arXiv 2502.02737)."""
        return cls._llama(49152, 8192, 30, 576, 1536, heads=(9, 3), rope_base=100000.0, tie_embeddings=True)
