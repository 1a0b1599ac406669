"""What it costs: ours against transformers + PEFT on the same weights, batches and machine, in one run.

Times are medians over runs that take turns after a warm-up. Peak memory is that of a process that does nothing else.
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
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from cli import UserError, option, parse, run, seed_everything, write_json
from data.chat import batches, encode_rows, is_response, load_rows
from data.tokenizer import Tokenizer
from baselines import random_like
from identify import spectra, stream_subspace, thin_svd, top_pairs
from lora import PREFIX, SUFFIXES, add_lora, read_adapter, save_lora
from model import GPT, response_loss
from train import finetune

ROOT, LR, ALPHA = Path(__file__).parent, 1e-4, 64
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
QWEN = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
QWEN_7B = {"self_attn.q_proj": (3584, 3584), "self_attn.k_proj": (512, 3584), "self_attn.v_proj": (512, 3584),
           "self_attn.o_proj": (3584, 3584), "mlp.gate_proj": (18944, 3584), "mlp.up_proj": (18944, 3584),
           "mlp.down_proj": (3584, 18944)}  # (out, in), in each of 28 layers


@dataclass(frozen=True)
class Arguments:
    """Time and memory beside transformers + PEFT: a training step (a), what GRASP adds to it (b), identification (c), generation (d),
    loading (e), the whole experiment by stage (f)."""
    only: tuple = option(("a", "b", "c", "d", "e", "f"), "comma-separated parts")
    data: str = option("", "JSONL file of chat rows, for the epoch of (a); without it that is left out")
    model: str = option("", "a Qwen2.5 folder with its tokenizer; without it a row's tokens are random, one for 4 bytes")
    rows: int = option(64, "rows of --data, at most")
    batch_size: int = option(8, "rows a step of the epoch")
    layers: int = option(4, "layers of the model of Qwen2.5-0.5B's shapes")
    rank: int = option(32, "of the LoRA, on every linear layer")
    repeats: int = option(7, "timed runs of each side")
    tiny: bool = option(False, "toy sizes: to see that everything runs, not for its numbers")
    out: str = option("bench.json", "the file to write")


def oracle():
    try:
        import peft
        import transformers
    except ImportError as e:
        raise UserError(f"no module {e.name}: pip install -r requirements-test.txt, or choose --only c,f") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers, peft


def checkpoint(kind, args, folder):
    """A checkpoint of random weights, and an adapter of ours for both sides to start from: (its folder, the adapter's)."""
    transformers, _ = oracle()
    base, adapter = folder / kind, folder / f"{kind}_lora"
    if kind == "gpt2":
        config = transformers.GPT2Config(**{**GPT2, **({"n_embd": 48, "n_layer": 2, "vocab_size": 500} if args.tiny else {})})
    else:
        toy = {"hidden_size": 56, "intermediate_size": 80, "vocab_size": 500} if args.tiny else {}
        config = transformers.Qwen2Config(**{**QWEN, **toy, "num_hidden_layers": args.layers})
    if not base.exists():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
        save_lora(add_lora(GPT.from_pretrained(base), args.rank, ALPHA, "all-linear"), adapter)
    return base, adapter


def ours(base, args):
    return add_lora(GPT.from_pretrained(base, dtype=torch.float32), args.rank, ALPHA, "all-linear")


def theirs(base, adapter=None):
    transformers, peft = oracle()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def train_ours(model, steps, **kwargs):
    with contextlib.redirect_stderr(io.StringIO()):
        return finetune(model, steps.__getitem__, len(steps), lr=LR, warmup=0, **kwargs)


def train_theirs(model, steps):
    """The same AdamW, decay, clipping and schedule as `finetune`'s, on PEFT's model."""
    parameters, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / len(steps))
    for inputs in steps:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def collate(rows):
    """Rows (ids, mask) as the usual collator of transformers hands them to a model."""
    ids, valid = pad_sequence([i for i, _ in rows], True), pad_sequence([torch.ones_like(i) for i, _ in rows], True)
    return {"input_ids": ids, "attention_mask": valid, "labels": ids.masked_fill(~pad_sequence([m for _, m in rows], True), -100)}


def fixed_step(args):
    """2 x 512 tokens, the second half of each row response."""
    T, vocab = (32, 500) if args.tiny else (512, GPT2["vocab_size"])
    return [(ids, torch.arange(T) >= T // 2) for ids in torch.randint(vocab, (2, T))]


def chat_examples(args):
    rows, vocab = load_rows(args.data)[:args.rows], 500 if args.tiny else QWEN["vocab_size"]
    if args.model:
        return encode_rows(Tokenizer.from_folder(args.model), rows, 2048)[0]
    masks = [torch.cat([torch.full((len(turn["content"].encode()) // 4 + 1,), is_response(turn)) for turn in row]) for row in rows]
    return [(torch.randint(vocab, mask.shape), mask) for mask in masks]


def turns(*sides, repeats, warm_up=True):
    """Seconds of each side's runs, taken in turn: [[first side's], [second side's]]."""
    seconds = [[] for _ in sides]
    for i in range(-warm_up, repeats):
        for times, side in zip(seconds, sides):
            began = time.perf_counter()
            side()
            if i >= 0:
                times.append(time.perf_counter() - began)
    return seconds


def alone(function, *args):
    """function(*args) in a process of its own, with as many threads."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def peak():
    """Bytes that this process held at most. From /proc where there is one: ru_maxrss is the parent's where that was larger."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_training(side, base, adapter, args, step):
    model = ours(base, args) if side == "ours" else theirs(base, adapter)
    (train_ours if side == "ours" else train_theirs)(model, [step])
    return peak()


def peak_of_loading(side, base):
    """What loading and reading every weight adds to the process, over the weights' size; imports and a first load aside."""
    load = GPT.from_pretrained if side == "ours" else theirs
    if side != "ours":
        oracle()
    before = peak()
    model = load(base)
    size = sum(p.nbytes for p in model.parameters())
    [p.sum() for p in model.parameters()]
    return (peak() - before) / size


def whole_adapter(folder):
    """(seconds, peak) of reading an adapter, its spectra, the bases of every module and the stream's."""
    began = time.perf_counter()
    svds = {path: thin_svd(A, B, alpha / len(A)) for path, (A, B, alpha, _) in read_adapter(folder).items()}
    top_pairs(svds), stream_subspace(svds)
    return time.perf_counter() - began, peak()


class Report:
    """Rows of the table; each is judged by its median where it has a target."""

    def __init__(self):
        self.rows = []

    def add(self, part, what, values, unit="x", bound="", target=0.0, sides=()):
        middle = median(values)
        verdict = "" if not bound else "hit" if (middle >= target if bound == ">=" else middle <= target) else "MISS"
        self.rows.append({"part": part, "what": what, "median": middle, "range": [min(values), max(values)], "unit": unit, "verdict": verdict,
                          "target": f"{bound} {target:g}" if bound else "", **{s: median(v) for s, v in zip(("ours", "theirs"), sides)}})
        spread = f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
        both = ", ".join(f"{median(v):.3g}" for v in sides)
        print(f"{part}  {what:62}{middle:9.4g} {unit:4}{spread:20}{self.rows[-1]['target']:9}{verdict:5}{both}", flush=True)

    def faster(self, part, what, seconds, bound="", target=0.0):
        self.add(part, what, [b / a for a, b in zip(*seconds)], "x", bound, target, seconds)


def part_a(args, folder, report):
    base, adapter = checkpoint("gpt2", args, folder)
    rows = fixed_step(args)
    steps = {"ours": tuple(map(torch.stack, zip(*rows))), "theirs": collate(rows)}
    a, b, losses = ours(base, args), theirs(base, adapter), ([], [])
    seconds = turns(lambda: losses[0].extend(train_ours(a, [steps["ours"]])), lambda: losses[1].extend(train_theirs(b, [steps["theirs"]])),
                    repeats=args.repeats)
    report.faster("a", "GPT-2-small step: theirs / ours (s: ours, theirs)", seconds, ">=", 1.1)
    report.add("a", "GPT-2-small: largest difference of a step's loss", [max(abs(x - y) for x, y in zip(*losses))], "nats", "<=", 1e-4)
    memory = [[alone(peak_of_training, side, base, adapter, args, step) / 2 ** 30] for side, step in steps.items()]
    report.add("a", "GPT-2-small step, peak memory: ours / theirs (GiB)", [memory[0][0] / memory[1][0]], "x", "<=", 0.85, memory)
    if not args.data:
        return print("a  the epoch over chat rows is left out: no --data")
    base, adapter = checkpoint("qwen2", args, folder)
    examples = chat_examples(args)
    order = torch.randperm(len(examples)).tolist()
    steps = {"ours": list(batches(examples, args.batch_size, 0, 0)),
             "theirs": [collate([examples[j] for j in order[i:i + args.batch_size]]) for i in range(0, len(order), args.batch_size)]}
    a, b, rows = ours(base, args), theirs(base, adapter), examples[:2]
    with torch.no_grad():
        pair = response_loss(a, *(pad_sequence(part, True) for part in zip(*rows))).item(), b(**collate(rows)).loss.item()
    what = f"{len(examples)} rows, {args.layers} layers of Qwen2.5-0.5B"
    report.add("a", f"{what}: difference of the loss", [abs(pair[0] - pair[1])], "nats", "<=", 1e-4)
    seconds = turns(lambda: train_ours(a, steps["ours"]), lambda: train_theirs(b, steps["theirs"]), repeats=min(args.repeats, 2),
                    warm_up=False)
    report.faster("a", f"epoch, {what}: theirs / ours (s)", seconds, ">=", 1.25)
    largest = {"ours": max(steps["ours"], key=lambda s: s[0].numel()), "theirs": max(steps["theirs"], key=lambda s: s["labels"].numel())}
    memory = [[alone(peak_of_training, side, base, adapter, args, step) / 2 ** 30] for side, step in largest.items()]
    report.add("a", "epoch's largest step, peak memory: ours / theirs (GiB)", [memory[0][0] / memory[1][0]], "x", "<=", 0.85, memory)


def part_b(args, folder, report):
    model = ours(checkpoint("gpt2", args, folder)[0], args)
    factor, step = random_like(top_pairs(spectra(model)), 0), tuple(map(torch.stack, zip(*fixed_step(args))))
    naive, grasp = turns(lambda: train_ours(model, [step]), lambda: train_ours(model, [step], factor=factor), repeats=args.repeats)
    report.add("b", "GPT-2-small step: GRASP / naive (s)", [g / n for n, g in zip(naive, grasp)], "x", "<=", 1.03, (grasp, naive))


def part_c(args, folder, report):
    shapes, layers = ({name: (16, 24) for name in QWEN_7B}, 2) if args.tiny else (QWEN_7B, 28)
    draw = lambda d_out, d_in: (torch.randn(args.rank, d_in) / d_in ** 0.5, torch.randn(d_out, args.rank) / d_out ** 0.5)
    A, B = draw(*shapes["mlp.down_proj"])
    thin = turns(lambda: thin_svd(A, B), repeats=args.repeats)[0]
    began = time.perf_counter()
    S = torch.linalg.svd(B @ A, full_matrices=False)[1]
    dense = time.perf_counter() - began
    report.add("c", f"{len(B)} x {A.shape[1]}: dense SVD / thin (s)", [dense / s for s in thin], "x", ">=", 100, (thin, [dense]))
    error = (S[:args.rank] - thin_svd(A, B)[1]).abs().max() / S[0]
    report.add("c", "largest relative difference of the singular values", [error.item()], "")
    adapter = folder / "qwen_7b_lora"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": args.rank, "lora_alpha": ALPHA})
    save_file({f"{PREFIX}model.layers.{i}.{name}{suffix}": tensor for i in range(layers) for name, shape in shapes.items()
               for suffix, tensor in zip(SUFFIXES, draw(*shape))}, adapter / "adapter_model.safetensors")
    pairs = [alone(whole_adapter, adapter) for _ in range(1 if args.tiny else 3)]
    report.add("c", f"whole adapter of Qwen2.5-7B's shapes, {layers * len(shapes)} modules", [s for s, _ in pairs], "s", "<=", 15)
    report.add("c", "its peak memory, the whole process", [p / 2 ** 30 for _, p in pairs], "GiB", "<=", 2)


def part_d(args, folder, report):
    base, (low, high), new = checkpoint("gpt2", args, folder)[0], (4, 9) if args.tiny else (16, 64), 8 if args.tiny else 128
    a, b = GPT.from_pretrained(base), theirs(base).eval()
    prompts = [torch.randint(a.config.vocab_size, (n,)) for n in torch.randint(low, high, (8,)).tolist()]
    inputs = {"input_ids": pad_sequence(prompts, True, padding_side="left"),
              "attention_mask": pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")}
    generate = (lambda: a.generate([p.tolist() for p in prompts], new, temperature=0),
                lambda: b.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)[:, -new:].tolist())
    same = sum(x == y for x, y in zip(*(side() for side in generate)))
    report.faster("d", f"8 prompts x {new} greedy tokens: generate() / ours (s)", turns(*generate, repeats=min(args.repeats, 5)), ">=", 1.5)
    report.add("d", "rows with the very same tokens, of 8", [same], "", ">=", 8)


def part_e(args, folder, report):
    for kind in ("gpt2", "qwen2"):
        base, _ = checkpoint(kind, args, folder)
        read = lambda load: lambda: [p.sum() for p in load(base).parameters()]  # what is mapped is read only where it is used
        report.faster("e", f"loading {kind} and reading every weight: from_pretrained / ours (s)",
                      turns(read(GPT.from_pretrained), read(theirs), repeats=args.repeats), ">=", 1.0)
        memory = [[alone(peak_of_loading, side, base)] for side in ("ours", "theirs")]
        report.add("e", f"loading {kind}, peak / weights' size (ours, theirs)", memory[0], "x", "<=", 1.1, memory)


def part_f(args, folder, report):
    """Seconds of each stage, by when its lines of progress come."""
    command = [sys.executable, str(ROOT / "grasp.py"), "--out", str(folder / "out"), *(["--quick"] if args.tiny else [])]
    stages, began = {"start": 0.0, "pretrain": 0.0, "methods": 0.0, "longer runs": 0.0}, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        last = began
        for line in process.stderr:
            label, now = line.split(":")[0], time.perf_counter()
            stage = "pretrain" if label == "pretrain" else "longer runs" if label.endswith("the steps") else "methods"
            stages["start" if last == began else stage] += now - last
            last = now
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with status {process.returncode}")
    for stage, seconds in {**stages, "figures": time.perf_counter() - last}.items():
        report.add("f", f"python grasp.py, {stage}", [seconds], "s")
    report.add("f", "python grasp.py, from nothing", [time.perf_counter() - began], "s", "<=", 150)


def main():
    args, parts = parse(Arguments), {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f}
    if set(args.only) - set(parts):
        raise UserError(f"--only {','.join(args.only)}: expected some of {', '.join(parts)}")
    seed_everything(0)
    args = replace(args, rank=min(args.rank, 4), layers=min(args.layers, 2)) if args.tiny else args
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    machine = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    print(f"{args}\n{machine}, float32 on the CPU", flush=True)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            parts[part](args, Path(folder), report)
    write_json(args.out, {"machine": machine, "config": json.loads(json.dumps(asdict(args))), "rows": report.rows})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
