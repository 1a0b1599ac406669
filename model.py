"""One decoder-only transformer that is GPT-2, Qwen2/2.5 or Qwen3 by its config: the model, loading, generation.

Modules carry Qwen's names in transformers; GPT-2's differ by one rename table. Shapes: B rows, T tokens, V vocabulary, D width
of the residual stream, H heads, K key/value heads, E head width.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError, open_safetensors, read_json

GPT2_NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "self_attn": "attn", "o_proj": "c_proj",
              "up_proj": "c_fc", "down_proj": "c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
              "norm": "ln_f"}


@dataclass(frozen=True)
class Config:
    """Everything that makes the model's function. The defaults are Qwen's family; widths are in units of the residual stream."""
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


def read_config(folder):
    """The Config of a Hugging Face checkpoint folder. Stops where a field is missing or asks for what this model does not do."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder, expected a checkpoint folder with config.json and safetensors")
    hf = read_json(path, "a checkpoint's configuration")

    def need(name):
        if hf.get(name) is None:
            raise UserError(f"{path}: no '{name}', expected a value (there is no default)")
        return hf[name]

    def only(value, name):  # where the field is there
        if hf.get(name, value) != value:
            raise UserError(f"{path}: '{name}' is {hf[name]!r}, supported: {value!r}")

    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if kind == "gpt2":
        need("activation_function"), only("gelu_new", "activation_function"), only(True, "scale_attn_weights")
        only(False, "scale_attn_by_inverse_layer_idx"), only(False, "add_cross_attention"), only(True, "tie_word_embeddings")
        d, heads = need("n_embd"), need("n_head")
        config = Config(vocab_size=need("vocab_size"), n_layer=need("n_layer"), n_head=heads, n_kv_head=heads, d_model=d,
                        head_dim=d // heads, d_mlp=hf.get("n_inner") or 4 * d, max_len=need("n_positions"), rope_theta=None,
                        norm_eps=need("layer_norm_epsilon"), model_type=kind, norm="layernorm", mlp="gelu", tied=True,
                        fused_qkv=True, qkv_bias=True, out_bias=True)
    elif kind in ("qwen2", "qwen3"):
        need("hidden_act"), only("silu", "hidden_act"), only(False, "use_sliding_window"), only(None, "rope_scaling")
        if set(hf.get("layer_types") or ()) - {"full_attention"}:
            raise UserError(f"{path}: 'layer_types' has {set(hf['layer_types'])}, supported: full_attention")
        rope = hf.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{path}: 'rope_parameters' is {rope}, supported: the type 'default'")
        theta = rope.get("rope_theta", hf.get("rope_theta"))
        if theta is None:
            raise UserError(f"{path}: no 'rope_theta', neither in 'rope_parameters' nor at the top level (there is no default)")
        if kind == "qwen3":
            only(False, "attention_bias")
        d, heads = need("hidden_size"), need("num_attention_heads")
        config = Config(vocab_size=need("vocab_size"), n_layer=need("num_hidden_layers"), n_head=heads, d_model=d,
                        n_kv_head=need("num_key_value_heads"), d_mlp=need("intermediate_size"), rope_theta=float(theta),
                        head_dim=need("head_dim") if kind == "qwen3" else hf.get("head_dim") or d // heads,
                        max_len=need("max_position_embeddings"), norm_eps=need("rms_norm_eps"), tied=need("tie_word_embeddings"),
                        model_type=kind, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")
    else:
        raise UserError(f"{path}: model_type is {kind!r}, supported: 'gpt2', 'qwen2', 'qwen3'")
    if config.n_head % config.n_kv_head or (kind != "qwen3" and "head_dim" not in hf and d % heads):
        raise UserError(f"{path}: {heads} heads do not divide into the width {d} or into {config.n_kv_head} key/value heads")
    return config


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):  # the mean square in fp32, cast back before the gain, as Qwen was trained
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def make_norm(config):
    return (RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(config.d_model, eps=config.norm_eps)


def rotate(x, cos, sin):
    """RoPE, half-rotation form: dimension i is paired with i + E/2. x (B, H, T, E), cos and sin (B or 1, 1, T, E)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.head_dim, self.fused = c.head_dim, c.fused_qkv
        sizes = [n * c.head_dim for n in self.heads]
        if c.fused_qkv:
            self.c_attn = nn.Linear(c.d_model, sum(sizes), bias=c.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, size, bias=c.qkv_bias) for size in sizes)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.o_proj = nn.Linear(sizes[0], c.d_model, bias=c.out_bias)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        qkv = self.c_attn(x).split([n * self.head_dim for n in self.heads], -1) if self.fused else \
            (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.view(B, T, n, self.head_dim).transpose(1, 2) for y, n in zip(qkv, self.heads))  # (B, H or K, T, E)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        # SDPA's is_causal is aligned to the top left, so it is right only where there is nothing before x
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and k.shape[2] == T,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        if c.mlp == "swiglu":
            self.gate_proj = nn.Linear(c.d_model, c.d_mlp, bias=c.out_bias)
        self.up_proj = nn.Linear(c.d_model, c.d_mlp, bias=c.out_bias)
        self.down_proj = nn.Linear(c.d_mlp, c.d_model, bias=c.out_bias)

    def forward(self, x):
        y = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * y if hasattr(self, "gate_proj") else F.gelu(y, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = make_norm(c), Attention(c)
        self.post_attention_layernorm, self.mlp = make_norm(c), MLP(c)

    def forward(self, h, rope=None, mask=None, cache=None):  # (B, T, D) -> (B, T, D)
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Cache:
    """Keys and values of the tokens seen so far, in buffers made once for `size` tokens; `valid` (B, size) marks real ones."""

    def __init__(self, size, valid):
        self.size, self.length, self.valid, self.store = size, 0, F.pad(valid, (0, size - valid.shape[1]), value=True), {}

    def extend(self, layer, k, v):
        """Append k, v (B, K, T, E) of one layer; returns all of them so far. `length` moves on once per forward pass."""
        if layer not in self.store:
            self.store[layer] = [y.new_empty(*y.shape[:2], self.size, y.shape[3]) for y in (k, v)]
        end = self.length + k.shape[2]
        for buffer, new in zip(self.store[layer], (k, v)):
            buffer[:, :, self.length:end] = new
        return [buffer[:, :, :end] for buffer in self.store[layer]]


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        embedding = lambda n: nn.Embedding.from_pretrained(torch.empty(n, c.d_model), freeze=False)  # initialised below
        self.embed_tokens = embedding(c.vocab_size)
        self.embed_positions = embedding(c.max_len) if c.rope_theta is None else None
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c)
        self.lm_head = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.checkpointing = False  # recompute each block in backward: less memory, about a third more time
        for name, p in self.named_parameters():  # GPT-2's init: what writes to the stream is scaled by its number of writers
            if p.dim() == 2 and not p.is_meta:  # a normal draw on meta would load torch's compiler, for nothing
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.n_layer) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, keep=None, cache=None):
        """Logits (B, T, V), or (N, V) at the N positions that the mask `keep` (B, T) marks. A `cache` holds what came before."""
        (B, T), c, start, mask = tokens.shape, self.config, 0 if cache is None else cache.length, None
        if start + T > c.max_len:
            raise UserError(f"{start + T} tokens, but the model's positions end at {c.max_len}")
        positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        if cache is not None and (start > 0 and T > 1 or not cache.valid.all()):
            positions = (positions - (~cache.valid).sum(1, keepdim=True)).clamp(min=0)  # (B, T), from each row's first real token
            causal = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
            seen, padding = cache.valid[:, None, None, :start + T], ~cache.valid[:, None, start:start + T, None]
            mask = causal & (seen | padding)  # (B, 1, T, start + T); padding sees padding, else its softmax would be empty
        h = self.embed_tokens(tokens)  # (B, T, D)
        rope = None
        if self.embed_positions is not None:
            h = h + self.embed_positions(positions)
        else:
            rates = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=h.device) / c.head_dim)  # (E/2,)
            angles = (positions.float()[..., None] * rates).repeat(*[1] * positions.dim(), 2).view(-1, 1, T, c.head_dim)
            rope = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for block in self.layers:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                h = torch.utils.checkpoint.checkpoint(block, h, rope, mask, use_reentrant=False)
            else:
                h = block(h, rope, mask, cache)
        if cache is not None:
            cache.length += T
        h, head = self.norm(h if keep is None else h[keep]), self.lm_head or self.embed_tokens
        return F.linear(h, head.weight) if cache is None else (head.weight @ h.mT).mT  # the faster product for few rows

    def path_in_transformers(self, name):
        """`layers.0.self_attn.o_proj` in transformers and PEFT: `model.layers.0...`, GPT-2's `transformer.h.0.attn.c_proj`."""
        if name.split(".")[0] == "lm_head":
            return name
        if self.config.model_type == "gpt2":
            return "transformer." + ".".join(GPT2_NAMES.get(part, part) for part in name.split("."))
        return "model." + name

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """A Hugging Face folder of gpt2, qwen2 or qwen3, in its stored dtype unless `dtype` says otherwise. UserError names the
        file, tensor or field where anything is missing, unexpected, misshapen, not finite or not supported. What needs no
        conversion stays mapped: replace the file under a loaded model, never write into it."""
        with torch.device("meta"):  # no memory for an initialisation that would be thrown away
            model = cls(read_config(folder))
        model.load_state_dict(read_tensors(Path(folder), model, device or "cpu", dtype), assign=True)
        return model.requires_grad_(False).eval()

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, stop=(), seed=0, allowed=None):
        """Continue each prompt (a list of token ids, of any lengths) by at most `max_new_tokens`, until an id of `stop`.

        Returns a list of lists: the new ids, the stop id included. temperature 0 is greedy; `top_p` keeps the smallest set of
        tokens with at least that probability; `allowed`, ids: nothing else can be sampled (the embedding's padding is no token).
        """
        if not prompts or not all(prompts):
            raise UserError("generate: expected at least one prompt, and at least one token in each")
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise UserError(f"generate: {max_new_tokens} new tokens, temperature {temperature}, top_p {top_p}; "
                            "expected at least 1, at least 0, above 0 and at most 1")
        device, width = self.embed_tokens.weight.device, max(map(len, prompts))
        valid = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)  # (B, width)
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        banned = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=device)
        if allowed is not None:
            banned.fill_(True)[torch.as_tensor(list(allowed), device=device)] = False
        stop, random = torch.tensor(list(stop), dtype=torch.long, device=device), torch.Generator(device).manual_seed(seed)
        cache, new, done = Cache(width + max_new_tokens, valid), [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
        last = torch.zeros_like(valid)
        last[:, -1] = True
        for _ in range(max_new_tokens):
            logits = self(tokens, keep=last[:, -tokens.shape[1]:], cache=cache).float().masked_fill(banned, -torch.inf)  # (B, V)
            if temperature == 0:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
                probs[probs.cumsum(-1) - probs >= top_p] = 0  # drop a token where those before it already reach top_p
                tokens = order.gather(-1, torch.multinomial(probs, 1, generator=random))  # (B, 1)
            new.append(tokens)
            done |= torch.isin(tokens[:, 0], stop)
            if done.all():
                break
        rows, ends = torch.cat(new, 1).tolist(), set(stop.tolist())
        return [row[:next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


def response_loss(model, tokens, mask, reduction="mean"):
    """Cross-entropy (nats) of the marked tokens given what stands before them, whose logits alone are computed. Both (B, T)."""
    logits = model(tokens[:, :-1], keep=mask[:, 1:])  # (N, V)
    return F.cross_entropy(logits.float(), tokens[:, 1:][mask[:, 1:]], reduction=reduction)


@torch.no_grad()
def nats(model, examples):
    """-ln P of each example's marked tokens (N,), and their number (N,). One at a time: there is no padding to get wrong."""
    device = model.embed_tokens.weight.device
    sums = [response_loss(model, ids[None].to(device), mask[None].to(device), "sum").item() for ids, mask in examples]
    return torch.tensor(sums, dtype=torch.double), torch.tensor([mask[1:].sum() for _, mask in examples])


def shards(folder):
    """{tensor name: its safetensors file} of a checkpoint folder, single or sharded, by what the files hold."""
    files, found = ["model.safetensors"], {}
    if not (folder / files[0]).exists():
        index = folder / "model.safetensors.index.json"
        listing = read_json(index, "an index of shards, since there is no model.safetensors")
        weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: no 'weight_map', expected tensor names and their files")
        files = sorted(set(map(str, weight_map.values())))
    for file in files:
        with open_safetensors(folder / file) as f:
            found |= dict.fromkeys(f.keys(), folder / file)
    return found


def read_tensors(folder, model, device, dtype):
    """The model's state dict from the folder's files, one tensor at a time; every name and shape is checked."""
    gpt2, found = model.config.model_type == "gpt2", shards(folder)
    stored = {("transformer." if gpt2 and not n.startswith(("transformer.", "lm_head.")) else "") + n: n for n in found}
    if gpt2:  # buffers with the causal mask
        stored = {n: s for n, s in stored.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    expected = {model.path_in_transformers(n): (n, p.shape) for n, p in model.named_parameters()}
    if model.config.tied and "lm_head.weight" in stored:  # some files carry a copy of the embedding
        expected["lm_head.weight"] = ("lm_head", model.embed_tokens.weight.shape)
    for problem, names in (("missing", expected.keys() - stored), ("unexpected", stored.keys() - expected)):
        if names:
            raise UserError(f"{folder}: {len(names)} {problem} tensors, the first {min(names)}")
    state = {}
    for path, (name, shape) in expected.items():
        file = found[stored[path]]
        with open_safetensors(file) as f:  # anew for each tensor, which maps its part of the file: where it is copied, the part goes
            tensor = f.get_tensor(stored[path])
        if gpt2 and tensor.dim() == 2 and ".h." in path:  # Conv1D stores (in, out)
            tensor = tensor.t().contiguous()
        if tensor.shape != shape:
            raise UserError(f"{file}: {stored[path]} is {tuple(tensor.shape)}, expected {tuple(shape)}")
        state[name] = tensor.to(device, dtype)
        if not all(bound.isfinite() for bound in state[name].aminmax()):  # no temporary of the tensor's size
            raise UserError(f"{file}: {stored[path]} has values that are not finite")
    head = state.pop("lm_head", None)
    if head is not None and not torch.equal(head, state["embed_tokens.weight"]):
        raise UserError(f"{folder}: lm_head.weight differs from the embedding, though the config ties them")
    return state
