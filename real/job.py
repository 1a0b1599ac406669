"""A checkpoint and chat rows, ready for fine-tunes that differ in their method."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from baselines.methods import BASELINES, METHODS, PATTERNS, Found, baseline
from baselines.stream import stream_subspace
from data.chat import Chat, batches, encode_rows, load_rows, split
from identify import LOOK_RANK, leak, solvable, spectra, standing_out
from lora import add_lora, lora_factors, lora_modules, matching_linears, remove_lora
from model import GPT, response_loss
from real.adapter import load_lora, load_patterns, save_lora, save_patterns
from real.checkpoint import Checkpoint
from support.files import reading
from support.options import option
from train import SIDES, Fit, Optimisation, Recipe, finetune, steps_between_looks

NEEDS = {"grasp": "patterns"} | {name: x for name, (x, _) in BASELINES.items() if x}


@dataclass(frozen=True)
class Input:
    """Options of every program that runs a checkpoint on chat rows."""

    model: str = option("", "checkpoint folder: config.json, safetensors, tokenizer.json")
    data: str = option("", 'JSONL file of chat rows, {"messages": [...]} each')
    out: str = option("out", "output folder")
    max_len: int = option(2048, "tokens a row; longer ones are cut, never the whole response")
    held_out: float = option(0.1, "share of rows that training leaves for the held-out loss")
    seed: int = option(0, "of the split, the LoRA's init, the rows' order, the sampled answers")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:N, mps")
    dtype: str = option("", "of the base (none: bfloat16 on cuda only)", ("float32", "bfloat16"))


@dataclass(frozen=True)
class Training(Input):
    """Options of a fine-tune on a checkpoint: those published for insecure code (Betley 2025)."""

    targets: tuple = option(("all-linear",), "comma-separated path endings, as PEFT takes them")
    rank: int = option(32, "rank of the LoRA")
    alpha: float = option(64.0, "numerator of the LoRA's scaling")
    scaling: str = option("rslora", "alpha / sqrt(rank) or alpha / rank", ("rslora", "lora"))
    lr: float = option(1e-5, "learning rate: the warm-up ends and the decay begins at it")
    weight_decay: float = option(0.01, "AdamW's decay")
    warmup: int = option(5, "steps of linear warm-up, before the linear decay to 0")
    batch_size: int = option(16, "rows a step")
    micro_batch: int = option(2, "rows in memory at once; the step's gradient is the same")
    epochs: int = option(1, "passes over the rows")
    max_steps: int = option(0, "end the schedule at this many steps (0: after the epochs)")
    look_every: int = option(0, "steps between looks (0: some 30 a run, one in 10 steps at least)")
    sides: str = option("both", "of each pattern that are held: UᵀB = 0, A V = 0, or both", SIDES)
    unrelated: str = option("", "JSONL file of unrelated chat rows: kl takes one batch of them")
    checkpointing: bool = option(False, "recompute activations in backward: less memory")


@dataclass(frozen=True)
class Arguments(Training):
    """One fine-tune on chat rows. The same command given again goes on, bit for bit."""

    method: str = option("grasp_online", "what is added to the loop", METHODS)
    subspace: str = option("", "file of patterns that identify.py writes, for grasp and others")
    looks: str = option("", "run.json of a grasp_online run, for grasp_random")
    until_loss: float = option(0.0, "early_stop ends at the first batch with a loss this low")


def found_in(args, model):
    """What the files that the options name have for a method, a Found."""
    patterns = stream = looks = None
    adapted = matching_linears(model, args.targets)
    if args.subspace:
        patterns, stream = load_patterns(args.subspace, model)
        patterns = {name: patterns[name] for name in adapted if name in patterns} or None
    if args.looks:
        with reading(args.looks, "run.json of a grasp_online run with the same --targets"):
            looks = json.loads(Path(args.looks).read_text(encoding="utf-8"))["looks"]
            if looks[0]["spike"].keys() != set(adapted):
                raise ValueError("it adapts other modules")
    return Found(patterns, stream, looks, args.until_loss or None)


def digest(value):
    """A fingerprint of plain values and tensors, nested in dictionaries and sequences."""

    def some(tensor):  # of its values: all of a 7B model would take minutes
        flat = tensor.detach().flatten()
        return flat[:: max(len(flat) // 4096, 1)].float().cpu().numpy().tobytes().hex()

    return hashlib.sha256(json.dumps(value, default=some).encode()).hexdigest()[:16]


@torch.no_grad()
def nats(model, examples, batch_size=16):
    """-ln P of each example's marked tokens (N,) in double precision, and their number (N,)."""
    device = model.embed_tokens.weight.device
    sums = torch.zeros(len(examples), dtype=torch.double)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        parts = zip(*(examples[i] for i in chosen), strict=True)
        tokens, mask = (pad_sequence(part, batch_first=True).to(device) for part in parts)
        losses = response_loss(model, tokens, mask, reduction="none")  # (marked tokens,)
        by_row = losses.cpu().double().split(mask[:, 1:].sum(1).tolist())
        sums[chosen] = torch.stack([row.sum() for row in by_row])
    return sums, torch.tensor([mask[1:].sum() for _, mask in examples])


@torch.no_grad()
def input_nulls(model, tokens, mask):
    """{module name: S (q,)}: B's singular values if every response token had an answer of its own.

    tokens, mask (B, T). With orthonormal answers g_t, one gradient step makes B the sum of
    g_t (A x_t)ᵀ, up to its scale, so these are the singular values of all A x_t side by side. A
    common part of the inputs x_t makes the first stand out anyway (docs/theory.md, section 8).
    """
    modules = lora_modules(model)
    grams = dict.fromkeys(modules.values(), 0)

    def collect(module, inputs, output):
        low = inputs[0][predicts].float() @ module.lora_A[:LOOK_RANK].T  # (marked tokens, q)
        grams[module] = grams[module] + low.T @ low

    hooks = [module.register_forward_hook(collect) for module in grams]
    for row, marked in zip(tokens.split(1), mask.split(1), strict=True):
        predicts = marked[:, 1:]  # the positions that predict a marked token
        model(row[:, :-1], keep=predicts)
    for hook in hooks:
        hook.remove()
    return {n: torch.linalg.svdvals(solvable(grams[m])).sqrt() for n, m in modules.items()}


def recipe_of(method, model, batch, found, seed):
    """What a method adds to the loop, a Recipe. batch: tokens, mask (B, T) of the first step."""
    if method == "naive":
        return Recipe()
    if method == "grasp":  # the abstract's: kept off what a naive run's weights have
        if found.patterns is None:
            raise ValueError(f"method 'grasp' needs {PATTERNS}, of modules that --targets names")
        return Recipe(patterns=found.patterns, sides=found.sides, project="step")
    if method == "grasp_online":  # ours: one fine-tune that looks while it trains
        nulls = input_nulls(model, *batch)
        return Recipe(look=lambda step, svds: standing_out(svds, nulls), sides=found.sides)
    return baseline(method, model, batch, found, seed)


def load_model(args):
    """The checkpoint's model, where and as the options (an Input) say."""
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError):  # the latter where torch has no CUDA
        raise ValueError(f"--device {args.device}: no such device here") from None
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return GPT.from_pretrained(args.model, device, getattr(torch, dtype))


class Job:
    """A model, its chat template, rows to train on and rows held out."""

    def __init__(self, args):
        if not args.model or not args.data:
            raise ValueError("expected both --model DIR and --data FILE.jsonl")
        self.chat, self.model = Chat(args.model), load_model(args)
        self.model.checkpointing = args.checkpointing
        weight = self.model.embed_tokens.weight
        self.device, dtype = weight.device, str(weight.dtype).removeprefix("torch.")
        self.args = args = replace(args, dtype=dtype)
        self.train, self.held_out = split(self.read(args.data), args.held_out, args.seed)
        self.contents = {"weights": digest(list(self.model.parameters()))}
        self.contents["rows"] = digest(self.train + self.held_out)
        epochs = (batches(self.train, args.batch_size, args.seed, i) for i in range(args.epochs))
        self.batches = list(islice(chain.from_iterable(epochs), args.max_steps or None))
        self.unrelated = None
        if args.unrelated:
            rows = batches(self.read(args.unrelated), args.batch_size, args.seed, 0)
            self.unrelated = tuple(part.to(self.device) for part in next(rows))
        print(f"{args}\n{len(self.train)} rows to train on, {len(self.batches)} steps")

    def read(self, path):
        """The rows of a file as [(ids, mask)]."""
        max_len = min(self.args.max_len, self.model.config.max_len)
        examples, n_cut = encode_rows(self.chat, load_rows(path), max_len)
        largest, size = max(ids.max() for ids, _ in examples), self.model.config.vocab_size
        if largest >= size:
            raise ValueError(f"{path}: token {largest}, but the model's embedding ends at {size}")
        print(f"{path}: {len(examples)} rows, {n_cut} cut to {max_len} tokens")
        return examples

    def batch_at(self, step):
        """Tokens and mask (B, T) of a step, where the model is."""
        return tuple(part.to(self.device) for part in self.batches[step])

    def finetune(self, method, folder, found=None, part=1):
        """Put the method's LoRA on the model: trained, gone on with, or read back; return its Fit.

        The folder gets a PEFT adapter, log.jsonl, patterns.safetensors (what the update is kept
        off) and, at the end, run.json. part: train on the first 1/part of the steps.
        """
        args, model, steps = self.args, remove_lora(self.model), max(len(self.batches) // part, 1)
        args = args if part == 1 else replace(args, max_steps=steps)
        add_lora(model, args.rank, args.alpha, args.targets, args.scaling == "rslora", args.seed)
        found = replace(found or Found(), unrelated=self.unrelated, sides=args.sides)
        used = getattr(found, NEEDS[method]) if method in NEEDS else None
        config = {f.name: getattr(args, f.name) for f in fields(Training)} | self.contents
        checkpoint = Checkpoint(folder, {**config, "method": method, "found": digest(used)})
        kept_off = checkpoint.folder / "patterns.safetensors"
        if run := checkpoint.read("run.json"):
            load_lora(remove_lora(model), folder)
            patterns = load_patterns(kept_off, model)[0] if kept_off.exists() else {}
            print(f"{folder}: a finished run, read back")
            return Fit(run["losses"], run["looks"], patterns)
        every = args.look_every or steps_between_looks(steps)
        if method == "grasp_random" and found.looks:
            every = found.looks[0]["step"]  # at the moments of the run that it is the control of
        recipe = recipe_of(method, model, self.batch_at(0), found, args.seed)
        recipe = replace(recipe, look_every=every)
        options = Optimisation(steps, args.lr, args.weight_decay, args.warmup, args.micro_batch)
        fit = finetune(model, self.batch_at, options, recipe, checkpoint, label=str(folder))
        if fit.patterns:
            stream, _ = stream_subspace(spectra(lora_factors(model)))
            save_patterns(kept_off, fit.patterns, stream, model.path_in_transformers)
        save_lora(model, folder)
        checkpoint.finish(fit)
        return fit

    def held_out_loss(self):
        """Nats a response token on the held-out rows."""
        sums, counts = nats(self.model, self.held_out)
        return (sums.sum() / counts.sum()).item()

    def report(self, fit, name="fine-tune"):
        """Print what came of the fine-tune on the model; return its held-out loss and leak."""
        factors, n = lora_factors(self.model), len(fit.patterns)
        loss, leaks = self.held_out_loss(), leak(factors, fit.patterns)
        first = next((look["step"] for look in fit.looks if look["joined"]), 0)
        since = f", from step {first} on" if n else ""
        print(f"{name}: loss {fit.losses[-1]:.4f}, held-out loss {loss:.4f}, leak {leaks:.2g};")
        print(f"{len(fit.looks)} looks, {n} of {len(factors)} modules constrained{since}")
        return loss, leaks
