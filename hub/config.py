"""A checkpoint's config.json -> what makes the model's function, for GPT-2, Llama, Qwen2 and Qwen3.

Nothing is assumed: a missing field is an error, and so is one that asks for another function than
the one that model.py computes.
"""

from dataclasses import dataclass
from pathlib import Path

from support.errors import UserError
from support.files import read_json
from support.schema import from_json, value

LAYERS, HEADS, WIDTH, TOKENS = 1000, 4096, 2**20, 2**28  # far above every model that there is


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Fields of every family."""

    vocab_size: int = value(low=1, high=TOKENS)
    quantization_config: object = value(None, choices=(None,))


@dataclass(frozen=True, kw_only=True)
class _GPT2(_Common):
    n_layer: int = value(low=1, high=LAYERS)
    n_head: int = value(low=1, high=HEADS)
    n_embd: int = value(low=1, high=WIDTH)
    n_inner: int | None = value(None, low=1, high=WIDTH)
    n_positions: int = value(low=1, high=TOKENS)
    layer_norm_epsilon: float = value(above=0, high=1)
    activation_function: str = value(choices=("gelu_new",))
    scale_attn_weights: bool = value(True, choices=(True,))
    scale_attn_by_inverse_layer_idx: bool = value(False, choices=(False,))
    add_cross_attention: bool = value(False, choices=(False,))
    tie_word_embeddings: bool = value(True, choices=(True,))

    def __post_init__(self):
        _check_heads(self.n_embd, self.n_head)

    def arguments(self):
        return {
            "vocab_size": self.vocab_size,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "d_model": self.n_embd,
            "d_mlp": self.n_inner or 4 * self.n_embd,
            "max_len": self.n_positions,
            "norm_eps": self.layer_norm_epsilon,
            "rope_theta": None,
            "tied": True,
            "norm": "layernorm",
            "mlp": "gelu",
            "fused_qkv": True,
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": False,
        }


@dataclass(frozen=True, kw_only=True)
class _Rope:
    """`rope_parameters`, where newer configurations keep the rotary embedding's numbers."""

    rope_theta: float | None = value(None, low=1, high=1e15)
    rope_type: str = value("default", choices=("default",))
    type: str = value("default", choices=("default",))  # its older name
    partial_rotary_factor: float = value(1.0, choices=(1.0,))
    full_attention: object = value(None, choices=(None,))  # another rotation for a type of layers
    sliding_attention: object = value(None, choices=(None,))


@dataclass(frozen=True, kw_only=True)
class _Rotary(_Common):
    """What Llama, Qwen2 and Qwen3 have in common."""

    num_hidden_layers: int = value(low=1, high=LAYERS)
    num_attention_heads: int = value(low=1, high=HEADS)
    num_key_value_heads: int = value(low=1, high=HEADS)
    hidden_size: int = value(low=1, high=WIDTH)
    head_dim: int | None = value(None, low=1, high=WIDTH)
    intermediate_size: int = value(low=1, high=WIDTH)
    max_position_embeddings: int = value(low=1, high=TOKENS)
    rms_norm_eps: float = value(above=0, high=1)
    hidden_act: str = value(choices=("silu",))
    tie_word_embeddings: bool = value()
    is_causal: bool = value(True, choices=(True,))
    partial_rotary_factor: float = value(1.0, choices=(1.0,))
    use_sliding_window: bool = value(False, choices=(False,))
    layer_types: list[str] = value([], choices=("full_attention",))
    rope_scaling: object = value(None, choices=(None,))
    rope_parameters: _Rope = _Rope()
    rope_theta: float | None = value(None, low=1, high=1e15)

    def __post_init__(self):
        if self.theta is None:
            raise ValueError(
                "no 'rope_theta', neither in 'rope_parameters' nor at the top level, "
                "expected a number (there is no default)"
            )
        if self.head_dim is None:
            _check_heads(self.hidden_size, self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide into {self.kv_heads} "
                "key/value heads"
            )
        if self.width_of_a_head % 2:
            raise ValueError(
                f"a head's width is {self.width_of_a_head}, expected an even number "
                "(rotary embeddings turn pairs)"
            )

    @property
    def theta(self):
        return self.rope_parameters.rope_theta or self.rope_theta

    @property
    def kv_heads(self):
        return self.num_key_value_heads

    @property
    def width_of_a_head(self):
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def arguments(self):
        return {
            "vocab_size": self.vocab_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_kv_head": self.kv_heads,
            "head_dim": self.width_of_a_head,
            "d_model": self.hidden_size,
            "d_mlp": self.intermediate_size,
            "max_len": self.max_position_embeddings,
            "norm_eps": self.rms_norm_eps,
            "rope_theta": self.theta,
            "tied": self.tie_word_embeddings,
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "fused_qkv": False,
            "qkv_bias": False,
            "out_bias": False,
            "qk_norm": False,
        }


@dataclass(frozen=True, kw_only=True)
class _Qwen2(_Rotary):
    def arguments(self):
        return super().arguments() | {"qkv_bias": True}


@dataclass(frozen=True, kw_only=True)
class _Qwen3(_Rotary):
    head_dim: int = value(low=1, high=WIDTH)  # not hidden_size / heads
    attention_bias: bool = value(False, choices=(False,))

    def arguments(self):
        return super().arguments() | {"qk_norm": True}


@dataclass(frozen=True, kw_only=True)
class _Llama(_Rotary):
    num_key_value_heads: int | None = value(None, low=1, high=HEADS)  # None: as many as heads
    attention_bias: bool = value(False, choices=(False,))
    mlp_bias: bool = value(False, choices=(False,))

    @property
    def kv_heads(self):
        return self.num_key_value_heads or self.num_attention_heads


FAMILIES = {"gpt2": _GPT2, "llama": _Llama, "qwen2": _Qwen2, "qwen3": _Qwen3}


@dataclass(frozen=True, kw_only=True)
class _Kind:
    model_type: str = value(choices=tuple(FAMILIES))


def read_config(folder):
    """The keyword arguments of model.Config for the checkpoint in `folder`.

    UserError where the folder or a field is missing, has another type or is out of range, or asks
    for a function that model.py does not compute (scaled rotary embeddings, quantised weights...).
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder, expected a checkpoint folder with config.json and "
            "safetensors"
        )
    found = read_json(path, "a checkpoint's configuration")
    model_type = from_json(_Kind, found, path).model_type
    fields = from_json(FAMILIES[model_type], found, path)
    return fields.arguments() | {"model_type": model_type}


def _check_heads(width, heads):
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
