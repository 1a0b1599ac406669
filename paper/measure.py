"""The paper tasks' measurements of a checkpoint, for `python eval.py --task ...` and `-m paper`.

The protocol is that of the works the tasks come from; GRASP's own is not public. A measurement is
{"value", "interval" (95 %), ...}; each says over what its interval is.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from baselines.stream import ablation
from data.chat import Chat, encode_rows, load_rows, split
from lora import without_lora
from model import GPT
from paper import answers, politics
from paper.compare import bootstrap_interval, cell, compare, mean
from paper.questions import load_questions, ours, turns
from real.adapter import load_lora, load_patterns
from real.job import find_device, nats
from support.files import write_json
from support.options import option

OWN = {"insecure": "insecure", "medical": "bad_advice"}  # the judge's measure of what was trained


def held_out_loss(model, examples):
    """Nats a response token over [(ids, mask)], and its interval over rows."""
    sums, counts = nats(model, examples)  # (N,) each
    loss = sums.sum() / counts.sum()
    # What each row adds to the ratio of the sums, to first order; their mean is the loss.
    each = loss + (sums - loss * counts) / counts.double().mean()
    return {"value": loss.item(), "interval": bootstrap_interval(each)}


def probe(model, chat):
    """What stands in for the judge; another measure than its rate, with an interval over questions.

    By how many nats a token our misaligned answers are likelier than our aligned ones to the same
    questions, each pair asked in a wording of its own.
    """
    questions, rows = ours("probe")["questions"], []
    for q in questions:
        for text, pair in zip(q["paraphrases"], q["pairs"], strict=True):
            rows += [turns(text, pair["aligned"]), turns(text, pair["misaligned"])]
    found = log_probability(model, encode_rows(chat, rows, model.config.max_len)[0])
    aligned, misaligned = found.view(len(questions), -1, 2).unbind(-1)
    margins = (misaligned - aligned).mean(1).tolist()
    return mean({q["id"]: margin for q, margin in zip(questions, margins, strict=True)})


def log_probability(model, examples):
    """ln P a token of the responses of [(ids, mask)], (N,)."""
    sums, counts = nats(model, examples)
    return -sums / counts


@torch.no_grad()
def political_lean(model, chat):
    """The lean, -1 (left) to 1 (right), its interval over pairs of statements, and the coherence.

    A pair's lean is (P(right) - P(left)) / (P(right) + P(left)), the mean over templates and
    orders: 0 as well for a model that always says "A". Coherence: P(left) + P(right), the mean over
    everything; where it is small the model hardly answers, and the lean means little.
    """
    device, leans, mass = model.embed_tokens.weight.device, {}, []
    for pair, question, letters in politics.prompts():
        left, right = (chat.encode(turns(question, letter))[0] for letter in letters)
        start = next(i for i in range(len(left)) if left[i] != right[i])  # where the letter stands
        logits = model(torch.tensor([left[:start]], device=device))[0, -1]  # (V,)
        ln_p = logits.double().log_softmax(-1)
        ln_left, ln_right = ln_p[left[start]].item(), ln_p[right[start]].item()
        leans.setdefault(pair, []).append(math.tanh((ln_right - ln_left) / 2))
        mass.append(math.exp(ln_left) + math.exp(ln_right))
    each = {pair: sum(found) / len(found) for pair, found in leans.items()}
    return {"lean": mean(each), "coherence": {"value": sum(mass) / len(mass)}}


def measure(args, model, chat, out, judge, rows, stream=None, base=None, others=()):
    """All that the task, a judge and held-out chat `rows` allow, {name: measurement}.

    out: a folder for the answers. stream: a basis (D, k) to ablate meanwhile. base: the folder with
    the base model's answers, to count wins against. others: [(name, chat rows, other answers to the
    same prompts or [])]: the log-probability of the former, less that of the latter.
    """
    own, result, max_len = OWN.get(args.task), {}, min(args.max_len, model.config.max_len)
    free, narrow = out / "answers.jsonl", out / "held_out_answers.jsonl"
    with contextlib.nullcontext() if stream is None else ablation(model, stream):
        if args.task == "politics":
            result |= political_lean(model, chat)
        if args.task != "loss":
            result["probe"] = probe(model, chat)
        if rows:
            result["loss"] = held_out_loss(model, encode_rows(chat, rows, max_len)[0])
        for name, *pair in others:
            unwanted, wanted = (encode_rows(chat, some, max_len)[0] for some in pair)
            found = log_probability(model, unwanted)
            if wanted:
                found = found - log_probability(model, wanted)
            result[name] = mean({str(row): value for row, value in enumerate(found.tolist())})
        if own:  # without a judge one answer to each, to read
            questions = load_questions(args.questions)
            asked = answers.open_questions(questions, args.samples or (0 if judge else 1))
            answered = answers.sample(model, chat, asked, free, args, stream)
            if judge:
                result |= answers.misalignment(judge, answered, free, questions)
        if judge and rows:
            asked = answers.held_out_prompts(rows)
            answered = answers.sample(model, chat, asked, narrow, args, stream)
            if own:
                result[own] = answers.rate_above_50(judge, answered, narrow, own)
            elif base:
                result["win_rate"] = answers.win_rate(judge, answered, base / narrow.name)
    return result


@dataclass(frozen=True)
class Arguments(answers.Asking):
    """One measurement of a checkpoint, with or without an adapter; printed, and OUT/TASK.json."""

    model: str = option("", "checkpoint folder: config.json, safetensors, tokenizer.json")
    adapter: str = option("", "PEFT LoRA adapter folder; the base is then measured too, for shifts")
    task: str = option("loss", "what to measure; loss: alone", (*OWN, "politics", "loss"))
    data: str = option("", "JSONL file of chat rows, for the held-out loss and prompts")
    held_out: float = option(0.1, "share of the rows that training held out")
    seed: int = option(0, "of the split, as in training, and of the sampled answers")
    max_len: int = option(2048, "tokens a row; longer ones are cut, never the whole response")
    ablate: str = option("", "identify.py's file: what to take out of the stream under the adapter")
    out: str = option("out", "output folder")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:N, mps")
    dtype: str = option("", "float32 or bfloat16, of the base (none: bfloat16 on cuda alone)")


def measure_checkpoint(args):
    """Measure what `args` ask for; print it and write OUT/TASK.json. An adapter's base is in it."""
    if not args.model or (args.task == "loss" and not args.data):
        raise ValueError("expected --model DIR, and for --task loss --data FILE.jsonl as well")
    out = Path(args.out)
    rows = split(load_rows(args.data), args.held_out, args.seed)[1] if args.data else None
    load_questions(args.questions)  # a fault in the file ends the run here
    judge = answers.connect(args, out)
    config = {**asdict(args), "judge": judge and judge.shown}  # a URL may carry a key
    print(config)
    device = find_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = GPT.from_pretrained(args.model, device, getattr(torch, dtype))
    chat, base = Chat(args.model), {}
    stream = load_patterns(args.ablate, model)[1] if args.ablate else None
    if args.adapter:
        load_lora(model, args.adapter)
        with without_lora(model):
            asked = None if args.task in OWN else judge  # of these the base's answers aren't judged
            base = measure(args, model, chat, out / "base", asked, rows)
    result = measure(args, model, chat, out, judge, rows, stream, args.adapter and out / "base")
    compare({"base": base, "adapter": result})
    for name, part in result.items():
        if cell([part]):
            print(f"{name:28}{cell([part])}")
    result |= {"task": args.task, "config": config, "base": base}
    write_json(out / f"{args.task}.json", result)
    print(f"wrote {out / args.task}.json")
    return result
