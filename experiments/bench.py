"""What it costs, beside transformers + PEFT and beside a naive fine-tune: a table in Markdown.

Random weights, the same on both sides. Sides take turns; the first turn does not count.
"""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence

from data.chat import batches
from identify import identify, look_spectra, spectra, standing_out
from lora import add_lora, lora_factors
from model import GPT
from support.options import option, parse, run
from train import Optimisation, Recipe, finetune

SHAPES = {  # as LlamaConfig names them
    "tiny": {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
D, KV, MLP, BLOCKS = 3584, 512, 18944, 28  # Qwen2.5-7B's, for identification
LINEARS_7B = [(D, D), (D, KV), (D, KV), (D, D), (D, MLP), (D, MLP), (MLP, D)] * BLOCKS  # in, out


@dataclass(frozen=True)
class Arguments:
    """Time training, looks, generation and identification; print a table in Markdown."""

    model: str = option("tiny", "shapes of the random model", tuple(SHAPES))
    device: str = option("cpu", "cpu (in float32) or cuda (in bfloat16)")
    rank: int = option(32, "of the LoRA, on every linear layer of the blocks")
    rows: int = option(16, "of the epoch, from 16 to --tokens tokens long")
    batch_size: int = option(4, "rows a step")
    tokens: int = option(128, "in each row of a step")
    new_tokens: int = option(32, "by which each of 4 prompts is continued")
    repeats: int = option(5, "turns")


def now(device):
    """Seconds: on the CPU the processor's own, of all threads; on a GPU a clock's, once idle."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def turns(args, *sides):
    """Seconds of each run of the sides, functions that take turns: a list for each."""
    seconds = [[] for _ in sides]
    for _ in range(args.repeats + 1):
        for times, side in zip(seconds, sides, strict=True):
            began = now(args.device)
            side()
            times.append(now(args.device) - began)
    return [times[1:] for times in seconds]


def print_row(what, this, *beside):
    """A row of the table: seconds of this, of what it is held against, and the ratio by turns."""
    ratios = [[a / b for a, b in zip(this, other, strict=True)] for other in beside]
    cells = [f"{median(v):.3g} ({min(v):.3g}-{max(v):.3g})" for v in (this, *beside, *ratios)]
    print(f"| {' | '.join([what, *cells])} |", flush=True)


def models(args, folder):
    """(ours, theirs): the same random weights, and a LoRA of zero on every linear layer."""
    import peft  # of requirements-test.txt
    import transformers

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.LlamaConfig(**SHAPES[args.model], **ends, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ours = GPT.from_pretrained(folder, args.device, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
    theirs = peft.get_peft_model(theirs.to(args.device), lora).train()
    return add_lora(ours, args.rank, args.rank, "all-linear"), theirs


def collated(rows, device):
    """Rows [(ids, mask)] as the usual collator of transformers hands them to a model."""
    pad = partial(pad_sequence, batch_first=True)
    ids = [row for row, _ in rows]
    labels = [row.masked_fill(~mask, -100) for row, mask in rows]
    inputs = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
    inputs["labels"] = pad(labels, padding_value=-100)
    return {name: part.to(device) for name, part in inputs.items()}


def both(args, lengths):
    """(our batches, theirs) of random rows: ours of like length, theirs as the rows come."""
    rows = [(torch.randint(500, (n,)), torch.arange(n) >= n // 2) for n in lengths]
    size, device = args.batch_size, args.device
    ours = [[part.to(device) for part in batch] for batch in batches(rows, size, 0, 0)]
    return ours, [collated(rows[i : i + size], device) for i in range(0, len(rows), size)]


def train_ours(model, steps, recipe=None):
    """The losses of a fine-tune over `steps`, batches of (tokens, mask)."""
    options = Optimisation(len(steps), lr=1e-4)
    return finetune(model, lambda step: steps[step], options, recipe).losses


def train_theirs(model, steps):
    """The same on PEFT's model, by the same AdamW, schedule and clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = Optimisation(len(steps), lr=1e-4).start(parameters)
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


def generation(args, ours, theirs):
    """Greedy continuations of 4 prompts of mixed length, beside those of transformers."""
    prompts = [torch.randint(1, 500, (n,)) for n in (8, 12, 16, 16)]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(args.device)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    generate = partial(ours.generate, [p.tolist() for p in prompts], args.new_tokens, temperature=0)
    oracle = partial(theirs.generate, **inputs, max_new_tokens=args.new_tokens, do_sample=False)
    expected = oracle()[:, ids.shape[1] :].tolist()
    same = sum(a == b for a, b in zip(generate(), expected, strict=True))
    what = f"4 x {args.new_tokens} greedy tokens, beside transformers ({same} of 4 rows the same)"
    print_row(what, *turns(args, generate, oracle))


def training(args, ours, theirs):
    """A step and an epoch beside PEFT; ten steps of GRASP beside ten naive ones; a look."""
    B, T = args.batch_size, args.tokens
    step, their_step = both(args, [T] * B)
    difference = abs(train_ours(ours, step)[0] - train_theirs(theirs, their_step)[0])
    epoch = both(args, torch.randint(16, T + 1, (args.rows,)).tolist())
    works = {f"step of {B} x {T} tokens (losses differ by {difference:.0e})": (step, their_step)}
    works[f"epoch of {args.rows} rows of 16 to {T} tokens"] = epoch
    for what, (steps, their_steps) in works.items():
        sides = partial(train_ours, ours, steps), partial(train_theirs, theirs, their_steps)
        print_row(f"{what}, beside PEFT", *turns(args, *sides))
    grasp = Recipe(patterns=identify(spectra(lora_factors(ours))), project="step")
    online = Recipe(look=lambda step, svds: standing_out(svds))
    sides = [partial(train_ours, ours, step * 10, recipe) for recipe in (None, grasp, online)]
    sides.append(lambda: standing_out(look_spectra(lora_factors(ours))))
    naive, *others = turns(args, *sides)
    whats = ("ten steps of `grasp`", "ten steps of `grasp_online`, with a look", "a look")
    for what, seconds in zip(whats, others, strict=True):
        print_row(f"{what}, beside ten naive steps", seconds, naive)


def main():
    """Print the table."""
    args = parse(Arguments)
    torch.manual_seed(0)
    print(f"{args}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | seconds | beside it | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = models(args, folder)
    generation(args, ours, theirs)
    training(args, ours, theirs)
    r, draw = args.rank, partial(torch.randn, device=args.device)
    factors = {i: (draw(r, d_in), draw(d_out, r)) for i, (d_in, d_out) in enumerate(LINEARS_7B)}
    sides = (lambda: identify(spectra(factors)), lambda: standing_out(look_spectra(factors)))
    found, look = turns(args, *sides)
    print_row(f"identification at Qwen2.5-7B's {len(factors)} modules, rank {args.rank}", found)
    print_row("a look there", look)


if __name__ == "__main__":
    run(main)
