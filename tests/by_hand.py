"""The transformer once more, from its weights and plain tensors, with the residual stream open."""

import math

import torch
from toys import tiny

from lora import add_lora, lora_modules

SITES = (0, 1, 2, 3)  # attention and MLP of block 0, of block 1; -1 is the embedding


def some_model():
    """A model whose every part matters: larger than at init, norms away from 1, with a LoRA."""
    model = tiny()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.mul_(8 if "proj" in name else 20)
        add_lora(model, 4, 4, ("q_proj", "o_proj", "down_proj"))
        for m in lora_modules(model).values():
            m.lora_B.normal_(std=0.3)
    return model


def some_rows(seed=5):
    """Tokens and mask of four rows."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(50, (4, 7), generator=g), torch.rand(4, 7, generator=g) > 0.4


def basis(k=2, seed=3):
    """An orthonormal basis (16, k)."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(16, k, generator=g))[0]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def unchanged(h, site):
    return h


def project_out(Q, but=None):
    """An edit: the basis taken out of the stream everywhere, but at one site."""
    return lambda h, site: h if site == but else h - (h @ Q) @ Q.T


def shifted(site, vector):
    """An edit: the vector added to the stream at one site."""
    return lambda h, at: h + vector if at == site else h


def loss_of(logits, tokens, mask):
    """The mean cross-entropy of the marked tokens."""
    ln_p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return -ln_p[mask[:, 1:]].mean()


class Weights:
    """The pieces that the computation is made of, from a model's parameters alone."""

    def __init__(self, model, with_lora):
        self.model, self.with_lora = model, with_lora
        self.state = dict(model.named_parameters())

    def linear(self, name, x):
        adapted = name + ".linear.weight" in self.state
        y = x @ self.state[name + (".linear.weight" if adapted else ".weight")].T
        if adapted and self.with_lora:
            low = x @ self.state[name + ".lora_A"].T
            scaling = self.model.get_submodule(name).scaling
            y = y + scaling * low @ self.state[name + ".lora_B"].T
        return y

    def norm(self, name, x):
        rms = (x.square().mean(-1, keepdim=True) + self.model.config.norm_eps).sqrt()
        return x / rms * self.state[name + ".weight"]

    def attention(self, name, x):
        (B, T, _), c = x.shape, self.model.config
        q, k, v = (
            self.linear(f"{name}.{part}_proj", x).view(B, T, c.n_head, -1).transpose(1, 2)
            for part in "qkv"
        )
        scores = self.turn(q) @ self.turn(k).transpose(2, 3) / math.sqrt(c.head_dim)
        future = torch.ones(T, T).triu(1).bool()
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.linear(f"{name}.o_proj", y.transpose(1, 2).reshape(B, T, -1))

    def turn(self, x):
        c, half = self.model.config, x.shape[-1] // 2
        rates = c.rope_theta ** (-torch.arange(half) * 2 / c.head_dim)
        angle = torch.arange(x.shape[2])[:, None] * rates
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def mlp(self, name, x):
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gate * gate.sigmoid() * up)


def by_hand(model, tokens, edit=unchanged, with_lora=True):
    """Logits (B, T, V); edit(h, site) replaces the stream after everything that writes to it."""
    w = Weights(model, with_lora)
    h = edit(w.state["embed_tokens.weight"][tokens], -1)
    for i in range(model.config.n_layer):
        x = w.norm(f"layers.{i}.input_layernorm", h)
        h = edit(h + w.attention(f"layers.{i}.self_attn", x), 2 * i)
        x = w.norm(f"layers.{i}.post_attention_layernorm", h)
        h = edit(h + w.mlp(f"layers.{i}.mlp", x), 2 * i + 1)
    return w.norm("norm", h) @ w.state["embed_tokens.weight"].T
