"""One decoder-only transformer: GPT-2, Llama, Qwen2/2.5 or Qwen3 by its config; generation.

Modules carry the names of Llama and Qwen in transformers; real/load.py has GPT-2's.
Shapes: B rows, T tokens, S tokens with those before them, V vocabulary, D width of the residual
stream, H heads, K key/value heads, E head width. This file needs no other of the six.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Everything that makes the model's function; the defaults are those of Llama and Qwen."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_mlp: int
    max_len: int  # tokens
    norm_eps: float
    rope_theta: float | None  # None: learned positions, added to the embedding
    tied: bool  # the head is the token embedding
    model_type: str = "qwen2"
    norm: str = "rmsnorm"  # or "layernorm"
    mlp: str = "swiglu"  # or "gelu" (its tanh form)
    fused_qkv: bool = False  # one c_attn, as in GPT-2
    qkv_bias: bool = False
    out_bias: bool = False  # attention output and MLP
    qk_norm: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, which is `width` long."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """(..., width) -> (..., width); the mean square is taken in fp32, as Qwen was trained."""
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return normed.to(x.dtype) * self.weight


def make_norm(config):
    """The norm that `config` asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps)


def rotate(x, cos, sin):
    """RoPE, half-rotation form: dimension i is paired with i + E/2.

    x (B, H, T, E); cos, sin (B or 1, 1, T, E).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention; several query heads may share one key/value head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of q, k, v
        self.sizes = [n * config.head_dim for n in self.heads]
        self.fused, self.qk_norm = config.fused_qkv, config.qk_norm
        if self.fused:
            self.c_attn = nn.Linear(config.d_model, sum(self.sizes), bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(config.d_model, self.sizes[0], bias=config.qkv_bias)
            self.k_proj = nn.Linear(config.d_model, self.sizes[1], bias=config.qkv_bias)
            self.v_proj = nn.Linear(config.d_model, self.sizes[2], bias=config.qkv_bias)
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(self.sizes[0], config.d_model, bias=config.out_bias)

    def forward(self, x, rope, mask, cache):
        """From x (B, T, D) to (B, T, D). mask (B, 1, T, S) marks what may be seen; None: causal."""
        B, T, _ = x.shape
        if self.fused:
            parts = self.c_attn(x).split(self.sizes, dim=-1)
        else:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (
            part.view(B, T, n, self.head_dim).transpose(1, 2)  # (B, H or K, T, E)
            for part, n in zip(parts, self.heads, strict=True)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        # is_causal is aligned to the top left: it is right only where nothing came before x
        causal = mask is None and k.shape[2] == T
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two linear layers around a GELU, or SwiGLU's three."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.out_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=config.out_bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.out_bias)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        y = self.up_proj(x)
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * y)
        return self.down_proj(F.gelu(y, approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, h, rope=None, mask=None, cache=None):
        """(B, T, D) -> (B, T, D)."""
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Cache:
    """Keys and values of the tokens seen so far, in buffers made once for `size` tokens.

    valid (B, size) marks real tokens; the prompts are padded on the left.
    """

    def __init__(self, size, valid):
        self.size, self.length, self.buffers = size, 0, {}
        self.valid = F.pad(valid, (0, size - valid.shape[1]), value=True)

    def extend(self, layer, k, v):
        """Append one layer's k, v (B, K, T, E); return all of them so far.

        `length` moves on once per forward pass, after the last layer.
        """
        if layer not in self.buffers:
            B, K, _, E = k.shape
            self.buffers[layer] = k.new_empty(B, K, self.size, E), v.new_empty(B, K, self.size, E)
        keys, values = self.buffers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        table = nn.Embedding.from_pretrained  # without a draw: `initialise` sets the values
        self.embed_tokens = table(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.embed_positions = None
        if config.rope_theta is None:
            self.embed_positions = table(torch.empty(config.max_len, config.d_model), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.checkpointing = False  # recompute blocks in backward: less memory, more time
        self.initialise()

    def initialise(self):
        """GPT-2's init; what writes to the stream is scaled by 1 / sqrt(their number)."""
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:  # a draw on meta would load torch's compiler
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, keep=None, cache=None):
        """Logits (B, T, V), or (N, V) at the N positions that the mask `keep` (B, T) marks.

        cache: what came before, extended in place. ValueError where the model's positions end.
        """
        T = tokens.shape[1]
        start = 0 if cache is None else cache.length
        most = self.config.max_len
        if start + T > most:
            raise ValueError(f"{start + T} tokens, but the model has {most} positions")
        positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        mask = None  # causal; an explicit one for padding, or for several tokens after a cache
        if cache is not None and (not cache.valid.all() or (start > 0 and T > 1)):
            n_padding = (~cache.valid).sum(1, keepdim=True)  # (B, 1)
            positions = (positions - n_padding).clamp(min=0)  # (B, T), from the first real token
            causal = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
            seen = cache.valid[:, None, None, : start + T]
            padding = ~cache.valid[:, None, start : start + T, None]
            mask = causal & (seen | padding)  # padding sees padding: an empty softmax is NaN
        h = self.embed_tokens(tokens)  # (B, T, D)
        rope = self.rope(positions, h.dtype) if self.embed_positions is None else None
        if self.embed_positions is not None:
            h = h + self.embed_positions(positions)
        for block in self.layers:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                h = checkpoint(block, h, rope, mask, use_reentrant=False)
            else:
                h = block(h, rope, mask, cache)
        if cache is not None:
            cache.length += T
        h = self.norm(h if keep is None else h[keep])
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # (V, D)
        if cache is None:
            return F.linear(h, head)
        return (head @ h.mT).mT  # the same product, faster where h has few rows

    def rope(self, positions, dtype):
        """cos and sin of the rotations, (B or 1, 1, T, E) each, from positions (T,) or (B, T)."""
        E = self.config.head_dim
        exponents = -torch.arange(0, E, 2, device=positions.device) / E
        rates = self.config.rope_theta**exponents  # (E/2,) radians a token
        half = positions.float()[..., None] * rates  # (..., T, E/2)
        angles = torch.cat((half, half), dim=-1).view(-1, 1, positions.shape[-1], E)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def path_in_transformers(self, name):
        """A parameter's or module's name there: `layers.0.x` -> `model.layers.0.x`."""
        if self.config.model_type == "gpt2":
            from real.load import gpt2_path  # here, so that this file can be copied alone

            return gpt2_path(name)
        return name if name.startswith("lm_head") else "model." + name

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """The model in a Hugging Face folder, frozen, in its stored dtype unless `dtype` is given.

        ValueError names the file, tensor or field that is missing, unexpected or not supported.
        Tensors may stay mapped from the file: replace a file under a loaded model, don't write it.
        """
        from real.load import read_config, read_state  # here, so that this file can be copied alone

        config = Config(**read_config(folder))
        with torch.device("meta"):  # no memory for an initialisation that would be thrown away
            model = cls(config)
        state = read_state(model, folder, device or "cpu", dtype)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop=(), seed=0, allowed=None):
        """Continue each prompt, ids, up to an id of `stop`. ValueError where the positions end.

        Returns a list of lists: the new ids, the stop id included. temperature 0 is greedy. Only
        ids of `allowed` are sampled (None: all; an embedding's padding is no token).
        """
        device = self.embed_tokens.weight.device
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        valid = torch.arange(width, device=device) >= width - lengths[:, None]  # (B, width)
        banned = torch.full((self.config.vocab_size,), allowed is not None, device=device)
        if allowed is not None:
            banned[torch.as_tensor(list(allowed), device=device)] = False
        stop_ids = torch.tensor(list(stop), dtype=torch.long, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        cache = Cache(width + max_new_tokens, valid)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        new = []
        for _ in range(max_new_tokens):
            last = torch.zeros_like(tokens, dtype=torch.bool)
            last[:, -1] = True
            logits = self(tokens, keep=last, cache=cache).float()  # (B, V)
            logits = logits.masked_fill(banned, -torch.inf)
            if temperature == 0:
                tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs = (logits / temperature).softmax(-1)
                tokens = torch.multinomial(probs, 1, generator=generator)
            new.append(tokens)
            done |= torch.isin(tokens[:, 0], stop_ids)
            if done.all():
                break
        return [cut_after(row, set(stop)) for row in torch.cat(new, 1).tolist()]


def cut_after(ids, stop):
    """The ids up to the first that is in `stop`, which is kept."""
    for i, token in enumerate(ids):
        if token in stop:
            return ids[: i + 1]
    return ids


def response_loss(model, tokens, mask, reduction="mean"):
    """Cross-entropy (nats) of the marked tokens given what stands before them; both (B, T).

    Logits are computed at the positions that predict a marked token, and nowhere else.
    """
    logits = model(tokens[:, :-1], keep=mask[:, 1:])  # (N, V)
    return F.cross_entropy(logits.float(), tokens[:, 1:][mask[:, 1:]], reduction=reduction)
