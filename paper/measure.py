"""The paper tasks' measurements of a checkpoint: `python eval.py --task ...`.

The protocol is that of the works the tasks come from (answers.py, politics.py); GRASP's own is not
public. A measurement is {"value", "interval" (95 %), ...}; over what the interval is, stands with
each.
"""

import contextlib
from dataclasses import asdict, dataclass

import torch

from baselines.stream import ablation
from data.chat import encode_chat, encode_rows, load_rows, split
from data.tokenizer import Tokenizer
from lora import load_lora, without_lora
from model import GPT
from paper import politics
from paper.answers import (
    Asking,
    check_ids,
    connect,
    fingerprint,
    held_out_prompts,
    kept_answers,
    mean,
    misalignment,
    open_questions,
    rate_above_50,
    sample,
    win_rate,
)
from paper.compare import compare
from paper.politics import bootstrap_interval
from paper.questions import load_questions, probe_questions
from real.losses import nats
from real.settings import SEED
from support.errors import UserError, user_errors
from support.files import writable_file, writable_folder, write_json
from support.options import option, parse, pick_device
from support.program import run
from support.subspace import load_subspace

ANSWERS = ("answers.jsonl", "held_out_answers.jsonl")  # files that are left to read
TRANSFER_ROWS = 100  # of each file of --transfer and --preference
OWN = {"insecure": "insecure", "medical": "bad_advice"}  # the judge's measure of what was trained


def chat(question, answer):
    """One question and its answer as a chat row."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encoded(model, tokenizer, rows, max_len):
    """Chat rows as [(ids, mask)], those longer than `max_len` cut.

    UserError where the model does not know an id.
    """
    examples, _ = encode_rows(tokenizer, rows, min(max_len, model.config.max_len))
    for ids, _ in examples:
        check_ids(model, ids.tolist())
    return examples


def held_out_loss(model, examples):
    """Nats a response token over [(ids, mask)], and its interval over rows.

    The interval is from what each row adds to the ratio of the sums, to first order.
    """
    sums, counts = nats(model, examples)  # (N,) each
    loss = sums.sum() / counts.sum()
    each = loss + (sums - loss * counts) / counts.double().mean()  # their mean is the loss
    return {"value": loss.item(), "interval": bootstrap_interval(each, seed=0)}


def probe(model, tokenizer):
    """What stands in for the judge where there is none; another measure than its rate.

    By how many nats a token our misaligned answers are likelier than our aligned ones to the same
    questions, each pair asked in a wording of its own. The interval is over questions.
    """
    margins = {}
    for q in probe_questions():
        chats = []
        for text, pair in zip(q.paraphrases, q.pairs, strict=True):
            chats.extend(chat(text, answer) for answer in pair)
        sums, counts = nats(model, encoded(model, tokenizer, chats, model.config.max_len))
        aligned, misaligned = (sums / counts).view(-1, 2).T  # -ln P a token
        margins[q.id] = (aligned - misaligned).mean().item()
    return mean(margins)


def log_probability(model, examples, less=None):
    """ln P a token of each row's responses: the mean over [(ids, mask)], its interval over rows.

    less: other responses to the same prompts, row by row, whose ln P a token is taken off.
    """
    sums, counts = nats(model, examples)
    per_token = -sums / counts
    if less is not None:
        sums, counts = nats(model, less)
        per_token = per_token + sums / counts
    return mean({str(row): value for row, value in enumerate(per_token.tolist())})


@torch.no_grad()
def political_lean(model, tokenizer, pairs=None):
    """The lean, -1 (left) to 1 (right), its interval over pairs of statements, and the coherence.

    Coherence: the probability that a letter is said. pairs: [Statement], all by default.
    """
    device, most = model.embed_tokens.weight.device, model.config.max_len
    table = {}
    for p in politics.prompts(pairs):
        left, right = (encode_chat(tokenizer, chat(p.text, letter)) for letter in p.options)
        (ids, mask), (other, _) = left, right
        check_ids(model, (*ids, *other))
        start = mask.index(True)  # the reply's first token: the letter, as it is written there
        if start > most:
            raise UserError(f"the lean's prompts have {start} tokens, the model {most} positions")
        logits = model(torch.tensor([ids[:start]], device=device))[0, -1]  # (V,)
        ln_p = logits.double().log_softmax(-1)
        table[p.pair, p.template, p.order] = ln_p[ids[start]].item(), ln_p[other[start]].item()
    leans, coherence = politics.lean(table)
    return {"lean": mean(leans), "coherence": {"value": coherence}}


def measure(
    args, model, tokenizer, out, judge=None, rows=None, stream=None, base=None, others=None
):
    """All that the task, a judge and held-out chat `rows` allow, {name: measurement}.

    Answers are kept in the folder `out`, also where there is no judge. stream: a basis (D, k) to
    ablate meanwhile. base: the folder with the base model's answers, to count wins against.
    others: {name: (chat rows, other answers to the same prompts or None)}, whose log-probability is
    measured, and of which the others' is taken off.
    """
    own = OWN.get(args.task)
    check_answers(args, model, out, judge and rows, stream)
    free, narrow = (out / name for name in ANSWERS)
    questions = load_questions(args.questions or None)
    result = {}
    with contextlib.nullcontext() if stream is None else ablation(model, stream):
        if args.task == "politics":
            result.update(political_lean(model, tokenizer))
        if args.task != "loss":
            result["probe"] = probe(model, tokenizer)
        if rows:
            examples = encoded(model, tokenizer, rows, args.max_len)
            result["loss"] = held_out_loss(model, examples)
        for name, (unwanted, wanted) in (others or {}).items():
            examples = encoded(model, tokenizer, unwanted, args.max_len)
            less = wanted and encoded(model, tokenizer, wanted, args.max_len)
            result[name] = log_probability(model, examples, less)
        if own:  # without a judge one answer to each, to read
            asked = open_questions(questions, args.samples if judge else args.samples or 1)
            answered = sample(model, tokenizer, asked, free, args, stream)
        if judge and rows:
            asked = held_out_prompts(rows)
            replied = sample(model, tokenizer, asked, narrow, args, stream)
    if judge and own:
        result.update(misalignment(judge, answered, free, questions))
    if judge and rows and own:
        result[own] = rate_above_50(judge, replied, narrow, own)
    elif judge and rows and base:
        result["win_rate"] = win_rate(judge, replied, base / narrow.name)
    return result


def check_answers(args, model, out, narrow_too, stream=None):
    """UserError where a file of answers that this run would go on with is of another model.

    narrow_too: whether it has answers to held-out prompts, too.
    """
    by = fingerprint(model, args, stream)
    free, narrow = (out / name for name in ANSWERS)
    if args.task in OWN:
        kept_answers(free, by)
    if narrow_too:
        kept_answers(narrow, by)


@dataclass(frozen=True)
class Arguments(Asking):
    """One measurement of a checkpoint, with or without an adapter.

    It is printed, and written to OUT/TASK.json.
    """

    model: str = option("", "checkpoint folder: config.json, safetensors, tokenizer files")
    adapter: str = option(
        "", "PEFT LoRA adapter folder; the base is then measured too, for the shift against it"
    )
    task: str = option(
        "loss",
        "what to measure; loss: on held-out responses, alone",
        choices=(*OWN, "politics", "loss"),
    )
    data: str = option(
        "",
        "JSONL file of chat rows: the held-out loss, and the judge's view of answers to the "
        "held-out prompts",
    )
    held_out: float = option(0.1, "share of the rows that training held out", above=0, high=0.9)
    seed: int = option(0, "of the split, as in training, and of the sampled answers", **SEED)
    max_len: int = option(
        2048, "tokens a row; longer ones are cut, never the whole response", low=4
    )
    subspace: str = option("", "file of found directions that identify.py writes, for --ablate")
    ablate: bool = option(
        False, "take those directions out of the residual stream while measuring the adapter"
    )
    out: str = option("out", "output folder")
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    dtype: str = option(
        "",
        "of the base (default: bfloat16 on cuda, float32 on the CPU)",
        choices=("", "float32", "bfloat16"),
    )


def measure_both(args, out, judge, rows):
    """The measurements of the checkpoint, or of the adapter, with the base's and the shifts.

    Prints the device and dtype.
    """
    device, dtype = pick_device(args.device, args.dtype)
    print(f"on {device}, base in {dtype}")
    tokenizer = Tokenizer.from_folder(args.model)
    with user_errors():
        model = GPT.from_pretrained(args.model, device, dtype)
    stream = load_subspace(args.subspace, model)[1] if args.ablate else None
    if not args.adapter:
        return measure(args, model, tokenizer, out, judge, rows, stream)
    with user_errors():
        load_lora(model, args.adapter)
    check_answers(args, model, out, judge and rows, stream)  # before the base is measured
    judge_of_base = None if args.task in OWN else judge  # it is needed to count wins, no more
    with without_lora(model):
        base = measure(args, model, tokenizer, out / "base", judge_of_base, rows)
    result = measure(args, model, tokenizer, out, judge, rows, stream, out / "base")
    compare({"base": base, "adapter": result})
    return {**result, "base": base}


def main(argv=None):
    """Measure what the command line asks for, print it and write it to OUT/TASK.json."""
    args = parse(Arguments, argv)
    if not args.model or (args.task == "loss" and not args.data):
        raise UserError("expected --model DIR, and for --task loss --data FILE.jsonl as well")
    if args.ablate != bool(args.subspace):
        raise UserError("expected --ablate and --subspace FILE together, or neither")
    name = f"{args.task}.json"
    out = writable_folder(args.out, ["judge.jsonl", *ANSWERS])
    if args.adapter:
        writable_folder(out / "base")
    writable_file(out / name)
    rows = None
    if args.data:
        _, rows = split(load_rows(args.data), args.held_out, args.seed, args.data)
    load_questions(args.questions or None)  # a fault in the file ends the run here
    judge = connect(args, out)
    config = {**asdict(args), "judge": judge and judge.shown}  # a URL may carry a key
    print(config)
    result = measure_both(args, out, judge, rows)
    write_json(out / name, {"task": args.task, "config": config, **result})
    for measured, part in result.items():
        if part.get("value") is not None:
            interval = ""
            if "interval" in part:
                low, high = part["interval"]
                interval = f"  [{low:.4f}, {high:.4f}]"
            count = f"  of {part['n']}" if "n" in part else ""
            print(f"{measured:24}{part['value']:9.4f}{interval}{count}")
    print(f"wrote {out / name}")


def program():
    """The command line of eval.py, with its errors in one line each."""
    run(main)
