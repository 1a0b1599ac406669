"""What it costs: ours against transformers + PEFT, and looks against naive, on one machine.

Times are medians over runs that take turns after a warm-up, on the same weights and batches. Peak
memory is that of a process that does nothing else.
"""

import contextlib
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from baselines.methods import recipe
from baselines.stream import stream_subspace
from data.synthetic import World
from experiments.runs import attach, start, train
from grasp import Toy
from hub.adapter import Adapter, read_adapter, write_adapter
from identify import joined, output_spectra, thin_svd, top_directions
from lora import LoRALinear, add_lora, lora_modules, save_lora
from model import GPT, Config, response_loss
from support.errors import UserError
from support.files import has_keys, writable_file, write_json
from support.options import option, parse
from support.program import run, seed_everything
from train import Optimisation, Recipe, finetune, keep_off_, look_entry

ROOT = Path(__file__).parent.parent
LR = 1e-4
ALPHA = 64
GIB = 2**30
SIDES = ("ours", "theirs")
LOOK_EVERY = Recipe().look_every  # steps

GPT2 = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 50257,
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_GPT2 = {**GPT2, "n_embd": 48, "n_layer": 2, "vocab_size": 500}
QWEN = {  # Qwen2.5-0.5B's shapes
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_QWEN = {**QWEN, "hidden_size": 56, "intermediate_size": 80, "vocab_size": 500}
QWEN_7B = Config(
    vocab_size=152064,
    n_layer=28,
    n_head=28,
    n_kv_head=4,
    head_dim=128,
    d_model=3584,
    d_mlp=18944,
    max_len=32768,
    norm_eps=1e-6,
    rope_theta=1e6,
    tied=False,
    qkv_bias=True,
)
TINY_7B = replace(
    QWEN_7B, vocab_size=500, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=32, d_mlp=48
)


@dataclass(frozen=True)
class Arguments:
    """Time and memory, beside transformers + PEFT and beside a naive fine-tune.

    (a) a training step and an epoch, (d) generation, (e) loading: beside transformers + PEFT.
    (b) what the constraint and the looks add to a step and to the toy's fine-tunes;
    (c) identification at 7B shapes; (f) `python grasp.py`, by stage; (g) a look at 7B shapes.
    """

    only: tuple = option(("a", "b", "c", "d", "e", "f", "g"), "comma-separated parts")
    data: str = option("", "JSONL file of chat rows, for the epoch of (a), which needs it")
    model: str = option(
        "", "a checkpoint folder, for its tokenizer (default: random tokens, one for 4 bytes)"
    )
    weights: bool = option(False, "the epoch trains the checkpoint of --model, weights and all")
    rows: int = option(64, "rows of --data, at most", low=1)
    batch_size: int = option(8, "rows a step of the epoch", low=1)
    layers: int = option(4, "layers of the model of Qwen2.5-0.5B's shapes", low=1)
    rank: int = option(32, "of the LoRA, on every linear layer", low=1)
    repeats: int = option(7, "timed runs of each side", low=1)
    tiny: bool = option(False, "toy sizes: to see that everything runs, not for its numbers")
    out: str = option("out/bench.json", "the file to write")


# What is measured, and how.


def turns(*sides, repeats, warm_up=True, clock=time.perf_counter):
    """Seconds of each side's runs, taken in turn: one list for each of `sides`, functions.

    clock: what tells the time; time.process_time does not count what other programs take.
    """
    seconds = [[] for _ in sides]
    if warm_up:
        for side in sides:
            side()
    for _ in range(repeats):
        for times, side in zip(seconds, sides, strict=True):
            began = clock()
            side()
            times.append(clock() - began)
    return seconds


def ratios(numerators, denominators):
    """The quotients of two lists, run by run."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def alone(function, *args):
    """function(*args) in a process of its own, with as many threads."""
    threads = (torch.get_num_threads(),)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, torch.set_num_threads, threads) as pool:
        return pool.apply(function, args)


def peak():
    """Bytes that this process held at most.

    From /proc where there is one: ru_maxrss is the parent's where that was larger.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Report:
    """The table's rows, printed as they come; where there is a target, the median is judged."""

    def __init__(self):
        self.rows = []

    def add(self, part, what, values, unit="x", at_most=None, at_least=None, sides=None):
        """A row. values: one number a run. sides: {name: numbers} that the values are made of."""
        middle = median(values)
        target, verdict = "", ""
        if at_most is not None:
            target = f"<= {at_most:g}"
            verdict = "hit" if middle <= at_most else "MISS"
        if at_least is not None:
            target = f">= {at_least:g}"
            verdict = "hit" if middle >= at_least else "MISS"
        medians = {name: median(numbers) for name, numbers in (sides or {}).items()}
        row = {
            "part": part,
            "what": what,
            "median": middle,
            "range": [min(values), max(values)],
            "unit": unit,
            "target": target,
            "verdict": verdict,
            **medians,
        }
        self.rows.append(row)
        spread = f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
        both = ", ".join(f"{name} {number:.3g}" for name, number in medians.items())
        line = f"{part}  {what:66}{middle:9.4g} {unit:5}{spread:20}{target:9}{verdict:5}{both}"
        print(line.rstrip(), flush=True)

    def note(self, part, text):
        """Say why something is not measured."""
        print(f"{part}  {text}", flush=True)


# Both sides' models, batches and steps.


def oracle():
    """(transformers, peft), or a UserError where they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as e:
        raise UserError(
            f"no module {e.name}: pip install -r requirements-test.txt, or choose --only b,c,f,g"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers, peft


def checkpoint(kind, args, folder):
    """A checkpoint of random weights and an adapter of ours, for both sides to start from.

    kind: "gpt2" or "qwen2". Returns (its folder, the adapter's).
    """
    transformers, _ = oracle()
    base, adapter = folder / kind, folder / f"{kind}_lora"
    if kind == "gpt2":
        config = transformers.GPT2Config(**(TINY_GPT2 if args.tiny else GPT2))
    else:
        shapes = TINY_QWEN if args.tiny else QWEN
        config = transformers.Qwen2Config(**shapes, num_hidden_layers=args.layers)
    if not base.exists():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
        save_lora(add_lora(GPT.from_pretrained(base), args.rank, ALPHA, "all-linear"), adapter)
    return base, adapter


def epoch_checkpoint(args, folder):
    """(Checkpoint, adapter, what it is): of Qwen2.5-0.5B's shapes, or that of --model itself."""
    if not args.weights:
        base, adapter = checkpoint("qwen2", args, folder)
        return base, adapter, f"{args.layers} layers of Qwen2.5-0.5B"
    adapter = folder / "real_lora"
    save_lora(ours(args.model, args), adapter)
    return args.model, adapter, Path(args.model).name


def gpt2_shaped(args):
    """A GPT of GPT-2-small's shapes with random weights, no files and no oracle."""
    shapes = TINY_GPT2 if args.tiny else GPT2
    config = Config(
        vocab_size=shapes["vocab_size"],
        n_layer=shapes["n_layer"],
        n_head=shapes["n_head"],
        n_kv_head=shapes["n_head"],
        head_dim=shapes["n_embd"] // shapes["n_head"],
        d_model=shapes["n_embd"],
        d_mlp=4 * shapes["n_embd"],
        max_len=shapes["n_positions"],
        norm_eps=1e-5,
        rope_theta=None,
        tied=True,
        model_type="gpt2",
        norm="layernorm",
        mlp="gelu",
        fused_qkv=True,
        qkv_bias=True,
        out_bias=True,
    )
    return add_lora(GPT(config), args.rank, ALPHA, "all-linear")


def ours(base, args):
    """Our model of a checkpoint, with a LoRA on every linear layer."""
    model = GPT.from_pretrained(base, dtype=torch.float32)
    return add_lora(model, args.rank, ALPHA, "all-linear")


def theirs(base, adapter=None):
    """The model of transformers; with an adapter, PEFT's model that trains it."""
    transformers, peft = oracle()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        return model
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def train_ours(model, steps, added=None):
    """The losses of a fine-tune over `steps`, batches of (tokens, mask). added: a Recipe."""

    def batch_at(step):
        return steps[step]

    options = Optimisation(steps=len(steps), lr=LR, warmup=0)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress is not for this table
        return finetune(model, batch_at, options, added).losses


def train_theirs(model, steps):
    """The same AdamW, decay, clipping and schedule as `finetune`'s, on PEFT's model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)

    def share_of_peak(step):
        return 1 - step / len(steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    losses = []
    for inputs in steps:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def padded(rows):
    """Rows [(ids, mask)] -> tokens (B, T), mask (B, T), right-padded."""
    ids, masks = zip(*rows, strict=True)
    return pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)


def collate(rows):
    """Rows [(ids, mask)] as the usual collator of transformers hands them to a model."""
    ids, mask = padded(rows)
    attended, _ = padded([(torch.ones_like(row), row) for row, _ in rows])
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def two_rows(args, vocab_size):
    """2 rows [(ids, mask)] of 512 tokens, the second half of each response."""
    T = 32 if args.tiny else 512
    response = torch.arange(T) >= T // 2
    return [(ids, response) for ids in torch.randint(vocab_size, (2, T))]


def chat_examples(args):
    """The rows of --data as [(ids, mask)]."""
    from data.chat import encode_rows, is_response, load_rows  # for this part alone
    from data.tokenizer import Tokenizer

    rows = load_rows(args.data)[: args.rows]
    if args.model:
        examples, _ = encode_rows(Tokenizer.from_folder(args.model), rows, 2048)
        return examples
    vocab_size = TINY_QWEN["vocab_size"] if args.tiny else QWEN["vocab_size"]
    examples = []
    for row in rows:
        parts = []
        for turn in row:
            n_tokens = len(turn["content"].encode()) // 4 + 1
            parts.append(torch.full((n_tokens,), is_response(turn)))
        mask = torch.cat(parts)
        examples.append((torch.randint(vocab_size, mask.shape), mask))
    return examples


# (a) Training beside transformers + PEFT.


def peak_of_training(side, base, adapter, args, step):
    """Bytes that a process holds at most for one step of one side."""
    if side == "ours":
        train_ours(ours(base, args), [step])
    else:
        train_theirs(theirs(base, adapter), [step])
    return peak()


def add_peaks(report, what, base, adapter, args, step):
    """A row: peak memory of one step, ours over theirs. step: {side: its batch}."""
    peaks = {side: alone(peak_of_training, side, base, adapter, args, step[side]) for side in SIDES}
    both = {side: [bytes_held / GIB] for side, bytes_held in peaks.items()}
    ratio = peaks["ours"] / peaks["theirs"]
    report.add("a", f"{what}, peak memory: ours / theirs (GiB)", [ratio], at_most=0.85, sides=both)


def part_a(args, folder, report):
    """A step of GPT-2-small's shapes; an epoch over chat rows at Qwen2.5-0.5B's, fewer layers."""
    step_beside_peft(args, folder, report)
    if args.data:
        epoch_beside_peft(args, folder, report)
    else:
        report.note("a", "the epoch over chat rows is left out: no --data")


def step_beside_peft(args, folder, report):
    """Loss, time and memory of the same step on both sides."""
    base, adapter = checkpoint("gpt2", args, folder)
    rows = two_rows(args, TINY_GPT2["vocab_size"] if args.tiny else GPT2["vocab_size"])
    step = {"ours": padded(rows), "theirs": collate(rows)}
    our_model, their_model = ours(base, args), theirs(base, adapter)

    our_losses = train_ours(our_model, [step["ours"]] * 5)  # the warm-up as well
    their_losses = train_theirs(their_model, [step["theirs"]] * 5)
    differences = [abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)]

    def one_of_ours():
        train_ours(our_model, [step["ours"]])

    def one_of_theirs():
        train_theirs(their_model, [step["theirs"]])

    a, b = turns(one_of_ours, one_of_theirs, repeats=args.repeats, warm_up=False)
    both = {"ours": a, "theirs": b}
    what = "GPT-2-small step"
    report.add("a", f"{what}: theirs / ours (s)", ratios(b, a), at_least=1.1, sides=both)
    worst = max(differences)
    report.add("a", f"{what}: largest difference of 5 losses", [worst], "nats", at_most=1e-4)
    add_peaks(report, what, base, adapter, args, step)


def epoch_beside_peft(args, folder, report):
    """The same rows on both sides: ours sorted into batches of like length, theirs as they come."""
    from data.chat import batches

    base, adapter, model_name = epoch_checkpoint(args, folder)
    examples = chat_examples(args)
    order = torch.randperm(len(examples)).tolist()
    shuffled = [examples[i] for i in order]
    firsts = range(0, len(shuffled), args.batch_size)
    steps = {
        "ours": list(batches(examples, args.batch_size, 0, 0)),
        "theirs": [collate(shuffled[first : first + args.batch_size]) for first in firsts],
    }
    our_model, their_model = ours(base, args), theirs(base, adapter)
    with torch.no_grad():
        our_loss = response_loss(our_model, *padded(examples[:2])).item()
        their_loss = their_model(**collate(examples[:2])).loss.item()
    what = f"{len(examples)} rows, {model_name}"
    difference = abs(our_loss - their_loss)
    report.add("a", f"{what}: difference of the loss", [difference], "nats", at_most=1e-4)

    def our_epoch():
        train_ours(our_model, steps["ours"])

    def their_epoch():
        train_theirs(their_model, steps["theirs"])

    repeats = min(args.repeats, 2)  # an epoch takes minutes, and warms itself up
    a, b = turns(our_epoch, their_epoch, repeats=repeats, warm_up=False)
    both = {"ours": a, "theirs": b}
    report.add("a", f"epoch, {what}: theirs / ours (s)", ratios(b, a), at_least=1.25, sides=both)
    largest = {
        "ours": max(steps["ours"], key=lambda step: step[0].numel()),
        "theirs": max(steps["theirs"], key=lambda step: step["labels"].numel()),
    }
    add_peaks(report, "the epoch's largest step", base, adapter, args, largest)


# (b) What the constraint and the looks add to a fine-tune.


def random_factor(model):
    """{module: U (out, 1)}: one random direction for each LoRA of the model."""
    factor = {}
    for name, module in lora_modules(model).items():
        random = torch.randn(len(module.lora_B), 1)
        factor[name] = torch.linalg.qr(random)[0]
    return factor


def part_b(args, folder, report):
    """GPT-2-small's shapes, from one look to the next; and the toy's whole fine-tunes."""
    steps_with_a_look(args, report)
    for targets in (Toy.targets, ("all-linear",)):
        whole_fine_tunes(args, folder, report, targets)


def steps_with_a_look(args, report):
    """As many steps as lie between two looks: naive, constrained, and with the look."""
    model = gpt2_shaped(args)
    batch = padded(two_rows(args, model.config.vocab_size))
    steps = [batch] * LOOK_EVERY
    constrained = Recipe(factor=random_factor(model))
    looking = recipe("grasp_online", model, batch)

    def naive_steps():
        train_ours(model, steps)

    def grasp_steps():
        train_ours(model, steps, constrained)

    def grasp_online_steps():
        train_ours(model, steps, looking)

    repeats = min(args.repeats, 3)
    seconds = turns(naive_steps, grasp_steps, grasp_online_steps, repeats=repeats)
    naive, grasp, online = ([s / LOOK_EVERY for s in one] for one in seconds)
    what = "GPT-2-small step"
    both = {"grasp": grasp, "naive": naive}
    report.add("b", f"{what}: grasp / naive (s)", ratios(grasp, naive), at_most=1.03, sides=both)
    both = {"online": online, "naive": naive}
    values = ratios(online, naive)
    report.add("b", f"{what}: grasp_online / naive (s)", values, at_most=1.1, sides=both)


def whole_fine_tunes(args, folder, report, targets):
    """The toy's fine-tunes, as `python grasp.py` makes them: naive and grasp_online in turns.

    On one thread, as there, so that seconds of the processor are what a quiet machine would take.
    """
    toy = Toy(targets=targets)
    if args.tiny:
        toy = replace(toy, d_model=32, pretrain_steps=5, steps=20)
    bench = start(World(), toy, folder)

    def fine_tune(method):
        attach(bench)
        added = recipe(method, bench.model, bench.rows)
        with contextlib.redirect_stderr(io.StringIO()):
            train(bench, added, toy.steps)

    def naive():
        fine_tune("naive")

    def grasp_online():
        fine_tune("grasp_online")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = turns(naive, grasp_online, repeats=args.repeats, clock=time.process_time)
    torch.set_num_threads(threads)
    what = f"toy, {', '.join(targets)}: grasp_online / naive (CPU s)"
    both = {"online": b, "naive": a}
    report.add("b", what, ratios(b, a), at_most=1.1, sides=both)


# (c) Identification at 7B shapes.


def random_adapter(linear, rank):
    """An Adapter of random A and B for a linear layer."""
    d_out, d_in = linear.weight.shape
    A = torch.randn(rank, d_in) / d_in**0.5
    return Adapter(A, torch.randn(d_out, rank), ALPHA)


def large_linears(config):
    """{path in transformers: a linear layer without values} of the blocks of a model."""
    with torch.device("meta"):
        model = GPT(config)
    return {
        model.path_in_transformers(name): module
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }


def whole_adapter(folder):
    """(seconds, peak bytes) of an adapter: read, its spectra, every module's and the stream's."""
    began = time.perf_counter()
    svds = {path: thin_svd(a.A, a.B, a.scaling) for path, a in read_adapter(folder).items()}
    top_directions(svds)
    stream_subspace(svds)
    return time.perf_counter() - began, peak()


def part_c(args, folder, report):
    """The thin SVD beside the dense one, and a whole adapter of Qwen2.5-7B's shapes."""
    config = TINY_7B if args.tiny else QWEN_7B
    linears = large_linears(config)
    down = random_adapter(linears["model.layers.0.mlp.down_proj"], args.rank)

    def thin():
        thin_svd(down.A, down.B)

    (seconds,) = turns(thin, repeats=args.repeats)
    began = time.perf_counter()
    S = torch.linalg.svd(down.B @ down.A, full_matrices=False)[1]
    dense = time.perf_counter() - began
    what = f"{len(down.B)} x {down.A.shape[1]}: dense SVD / thin (s)"
    both = {"thin": seconds, "dense": [dense]}
    report.add("c", what, [dense / s for s in seconds], at_least=100, sides=both)
    error = (S[: args.rank] - thin_svd(down.A, down.B)[1]).abs().max() / S[0]
    what = "largest relative difference of the singular values"
    report.add("c", what, [error.item()], "")

    adapter = folder / "qwen_7b_lora"
    adapters = {path: random_adapter(linear, args.rank) for path, linear in linears.items()}
    write_adapter(adapter, adapters, fan_in_fan_out=False, n_layer=config.n_layer)
    runs = [alone(whole_adapter, adapter) for _ in range(1 if args.tiny else 3)]
    what = f"whole adapter of Qwen2.5-7B's shapes, {len(adapters)} modules"
    report.add("c", what, [seconds for seconds, _ in runs], "s", at_most=15)
    peaks = [held / GIB for _, held in runs]
    report.add("c", "its peak memory, the whole process", peaks, "GiB", at_most=2)


# (d) Generation and (e) loading, beside transformers.


def part_d(args, folder, report):
    """Greedy continuations of prompts of mixed length."""
    base, _ = checkpoint("gpt2", args, folder)
    low, high, n_new = (4, 9, 8) if args.tiny else (16, 64, 128)
    our_model, their_model = GPT.from_pretrained(base), theirs(base).eval()
    lengths = torch.randint(low, high, (8,)).tolist()
    prompts = [torch.randint(our_model.config.vocab_size, (n,)) for n in lengths]
    lists = [prompt.tolist() for prompt in prompts]
    attended = [torch.ones_like(prompt) for prompt in prompts]
    inputs = {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence(attended, batch_first=True, padding_side="left"),
    }

    def our_continuations():
        return our_model.generate(lists, n_new, temperature=0)

    def their_continuations():
        whole = their_model.generate(
            **inputs, max_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
        return whole[:, -n_new:].tolist()

    pairs = zip(our_continuations(), their_continuations(), strict=True)
    n_same = sum(a == b for a, b in pairs)
    a, b = turns(our_continuations, their_continuations, repeats=min(args.repeats, 5))
    both = {"ours": a, "theirs": b}
    what = f"8 prompts x {n_new} greedy tokens: generate() / ours (s)"
    report.add("d", what, ratios(b, a), at_least=1.5, sides=both)
    report.add("d", "rows with the very same tokens, of 8", [n_same], "", at_least=8)


def read_every_weight(model):
    """What is mapped is read only where it is used: use all of it; return its bytes."""
    for p in model.parameters():
        p.sum()
    return sum(p.nbytes for p in model.parameters())


def peak_of_loading(side, base):
    """What loading and reading every weight adds to the process, over the weights' size."""
    if side == "ours":
        before = peak()
        model = GPT.from_pretrained(base)
    else:
        oracle()  # its import is not part of loading
        before = peak()
        model = theirs(base)
    size = read_every_weight(model)
    return (peak() - before) / size


def part_e(args, folder, report):
    """Time and memory until every weight has been read."""
    for kind in ("gpt2", "qwen2"):
        base, _ = checkpoint(kind, args, folder)

        def load_ours(base=base):
            read_every_weight(GPT.from_pretrained(base))

        def load_theirs(base=base):
            read_every_weight(theirs(base))

        a, b = turns(load_ours, load_theirs, repeats=args.repeats)
        both = {"ours": a, "theirs": b}
        what = f"loading {kind} and reading every weight: from_pretrained / ours (s)"
        report.add("e", what, ratios(b, a), at_least=1.0, sides=both)
        peaks = {side: [alone(peak_of_loading, side, base)] for side in SIDES}
        what = f"loading {kind}, peak / weights' size"
        report.add("e", what, peaks["ours"], at_most=1.1, sides=peaks)


# (f) The whole experiment.


def stage_of(label):
    """The stage that a line of progress belongs to, by its label."""
    if label == "pretrain":
        return "pretrain"
    return "longer runs" if label.endswith("the steps") else "methods"


def part_f(args, folder, report):
    """Seconds of each stage of `python grasp.py`, by when its lines of progress come."""
    command = [sys.executable, "grasp.py", "--out", str(folder / "out")]
    if args.tiny:
        command.append("--quick")
    stages = {"start": 0.0, "pretrain": 0.0, "methods": 0.0, "longer runs": 0.0}
    began = time.perf_counter()
    last = began
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            now = time.perf_counter()
            stage = "start" if last == began else stage_of(line.split(":")[0])
            stages[stage] += now - last
            last = now
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with status {process.returncode}")
    ended = time.perf_counter()
    stages["figures"] = ended - last
    for stage, seconds in stages.items():
        report.add("f", f"python grasp.py, {stage}", [seconds], "s")
    report.add("f", "python grasp.py, from nothing", [ended - began], "s", at_most=150)


# (g) A look at 7B shapes.


class Updates(nn.Module):
    """The LoRAs of a large model without its weights: all that a look reads.

    Every B is random, and half of it, by norm, one direction: a look that takes something.
    """

    def __init__(self, config, rank):
        super().__init__()
        self.modules_by_path = nn.ModuleList()
        for linear in large_linears(config).values():
            module = LoRALinear(linear, rank, ALPHA)
            adapter = random_adapter(linear, rank)
            shared = torch.randn(len(adapter.B), 1) @ torch.randn(1, rank)
            module.lora_A = nn.Parameter(adapter.A)
            module.lora_B = nn.Parameter(adapter.B + shared)
            self.modules_by_path.append(module)


def look_once(updates, look):
    """What the loop does at a look, from an empty factor; return how many directions joined."""
    svds = output_spectra(updates)
    found = look(0, svds)
    factor = joined({}, found)
    keep_off_(lora_modules(updates), factor)
    look_entry(0, svds, found)
    return sum(U.shape[1] for U in found.values())


def part_g(args, folder, report):
    """Seconds of a look at 196 modules, and its share of a step, by way of one block's step."""
    config = TINY_7B if args.tiny else QWEN_7B
    updates = Updates(config, args.rank)
    n_modules = len(lora_modules(updates))
    look = recipe("grasp_online", None, None).look
    weights = {name: m.lora_B.data.clone() for name, m in lora_modules(updates).items()}

    began = time.perf_counter()
    n_joined = look_once(updates, look)
    first = time.perf_counter() - began
    what = f"first look at Qwen2.5-7B's {n_modules} modules, rank {args.rank}, {n_joined} join"
    report.add("g", what, [first], "s")

    seconds = []
    for _ in range(args.repeats):
        for name, module in lora_modules(updates).items():
            module.lora_B.data.copy_(weights[name])
        began = time.perf_counter()
        look_once(updates, look)
        seconds.append(time.perf_counter() - began)
    report.add("g", "a later look", seconds, "s")

    step, n_tokens = step_of_one_block(args, config)
    look_at_one_block = median(seconds) / config.n_layer
    shares = [look_at_one_block / LOOK_EVERY / s for s in step]
    what = f"a look every {LOOK_EVERY} steps, share of a step of {n_tokens} tokens"
    sides = {"look": [look_at_one_block], "step": step}
    report.add("g", f"{what} (s, one block)", shares, at_most=0.1, sides=sides)


def step_of_one_block(args, config):
    """(seconds of naive steps, tokens of a step) of one block of the model, in float32.

    The embedding and the head have 1,000 tokens only: whole ones would make the step longer. So
    would more tokens in a step; a look does not depend on them.
    """
    one = replace(config, n_layer=1, vocab_size=min(config.vocab_size, 1000))
    model = add_lora(GPT(one), args.rank, ALPHA, "all-linear")
    batch = padded(two_rows(args, one.vocab_size))

    def step():
        train_ours(model, [batch])

    (seconds,) = turns(step, repeats=min(args.repeats, 3))
    return seconds, batch[0].numel()


PARTS = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
    "e": part_e,
    "f": part_f,
    "g": part_g,
}


def machine():
    """What the numbers were measured on."""
    cpu = platform.processor()
    described = Path("/proc/cpuinfo")
    if described.exists():
        found = re.search(r"model name\s*: (.*)", described.read_text())
        if found:
            cpu = found[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def main():
    """The command line."""
    args = parse(Arguments)
    if args.weights and not args.model:
        raise UserError("--weights needs --model, the checkpoint to train")
    for part in args.only:
        if part not in PARTS:
            raise UserError(f"--only has '{part}', expected some of {', '.join(PARTS)}")
    if args.tiny:
        args = replace(args, rank=min(args.rank, 4), layers=min(args.layers, 2))
    if args.data:
        chat_examples(args)  # a fault in a file ends the run here
    elif args.model:
        raise UserError("--model is for the rows of --data; expected both, or neither")
    out = writable_file(args.out, has_keys("machine", "rows"))
    seed_everything(0)
    where = machine()
    print(f"{args}\n{where}, float32 on the CPU", flush=True)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            PARTS[part](args, Path(folder), report)
            config = json.loads(json.dumps(asdict(args)))
            write_json(out, {"machine": where, "config": config, "rows": report.rows})
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
