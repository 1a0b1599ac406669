"""A paper task by one command: base, naive, GRASP and the baselines over seeds, a table, a figure.

Of the paper (arXiv 2605.27676) only the abstract is public to us: its models, layers, ranks and
tables are not. The protocol is that of the works its tasks come from (paper/answers.py), ours for
politics. `grasp` is the abstract's method, `grasp_online` goes beyond it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from baselines.methods import METHODS, Found
from data.chat import load_rows, split
from experiments.paper_figure import paper as draw
from lora import lora_modules
from paper.answers import Asking, connect, prompt_of
from paper.compare import COMPARISONS, CURVES, SMALLER, cell, compare
from paper.measure import OWN, measure
from paper.questions import load_questions
from real.job import Job, Training
from real.stages import fit, in_order
from support.files import write_json
from support.options import option, parse, run

SHORTER = {"naive_quarter": 4, "naive_half": 2}  # naive, on a part of the steps
ON_REQUEST = ("grasp_gradient_only", "early_stop", "kl")  # and kl where --unrelated is given
DEFAULT = (*SHORTER, *SMALLER, *(name for name in METHODS if name not in ON_REQUEST))
TRANSFER_ROWS = 100  # of each file of --transfer and --preference
COLUMNS = ("misaligned", "misaligned_of_coherent", "coherent", "insecure", "bad_advice")
COLUMNS += ("coherence", "win_rate", "loss")
HARM = {  # the figure shows the first that was measured
    "misaligned": "misaligned answers, share of those scored",
    "lean_shift": "shift of the political lean, right is positive",
    "spill": "open answers with a word of the task, share",
    "probe_shift": "probe: shift to misaligned answers, nats a token",
}
# Options that change no measurement of a seed.
NOT_MEASURED = ("out", "methods", "seeds", "seed", "device", "micro_batch", "checkpointing")
NOT_MEASURED += ("judge_model", "judge_key_env", "judge_workers")


@dataclass(frozen=True)
class Arguments(Asking, Training):
    """One paper task over seeds: table.md, tradeoff.png and results.json in --out.

    Fine-tunes and evaluations that an earlier run there has finished are read back.
    """

    task: str = option("insecure", "the paper task", (*OWN, "politics"))
    methods: tuple = option(DEFAULT, "comma-separated; naive always, and kl where --unrelated is")
    control: str = option("", "JSONL of unobjectionable answers to the same prompts, for a control")
    transfer: tuple = option((), "JSONL files of unwanted answers elsewhere: how likely they get")
    preference: tuple = option((), "two JSONL files: how much likelier are the first one's answers")
    seeds: int = option(3, "how many, from --seed on: of the LoRA, the split, the rows, samples")
    pattern_rank: int = option(1, "patterns of each module that are identified in the naive run")


def fine_tuned(args, methods):
    """Yield (name, job, the stream to ablate or None) with the LoRA of each on job.model.

    The base comes first, then `methods`, trained or read back, then the control.
    """
    folder = Path(args.out) / f"seed_{args.seed}"
    args = replace(args, out="", judge="")  # no part of a fine-tune; the URL may carry a key
    job, found = Job(args), Found()
    yield "base", job, None
    for name in SHORTER:
        if name in methods:
            job.finetune("naive", folder / name, part=SHORTER[name])
            yield name, job, None
    for method in in_order([name for name in methods if name in METHODS], args.unrelated):
        ablated = method == "ablate_inference"  # the naive run, with hooks while it answers
        trained = "naive" if ablated else method
        _, found = fit(job, trained, folder / trained, found, args.pattern_rank)
        if method == "naive" and found.stream.shape[1] != args.pattern_rank:
            raise ValueError(f"{folder}: of another --pattern-rank, expected it or another --out")
        if method in methods:
            yield method, job, found.stream if ablated else None
        for name in SMALLER if method == "naive" else ():
            if name in methods:
                job.finetune("naive", folder / "naive")  # read back, as large as it was
                for module in lora_modules(job.model).values():
                    module.scaling *= SMALLER[name]
                yield name, job, None
    if args.control:
        del job  # one model in memory at a time
        job = Job(replace(args, data=args.control))
        job.finetune("naive", folder / "control")
        yield "control", job, None


def one_seed(args, methods, others, judge, config):
    """{method: measurements} of one seed; what is on disk under the same options is read back."""
    folder, results = Path(args.out) / f"seed_{args.seed}", {}
    neutral = args.task == "politics" and args.control
    _, rows = split(load_rows(args.control if neutral else args.data), args.held_out, args.seed)
    for name in ["base", *methods, *(["control"] if args.control else [])]:
        path = folder / name / f"{args.task}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        results[name] = result if result.get("config") == config else None
    for name, job, stream in fine_tuned(args, methods) if None in results.values() else ():
        if results[name] is None:
            base, out = None if name == "base" else folder / "base", folder / name
            found = measure(args, job.model, job.chat, out, judge, rows, stream, base, others)
            results[name] = {"task": args.task, "config": config, **found}
            write_json(out / f"{args.task}.json", results[name])
        del job  # so that the control's finds room
    compare(results)
    return results


def settings(args, judge):
    """What an evaluation depends on beside the seed, as JSON has it; of files, what is in them."""
    config = {name: value for name, value in asdict(args).items() if name not in NOT_MEASURED}
    config |= {"judge": judge and judge.model, "contents": {}}  # a URL may carry a key, or change
    paths = (args.model, args.data, args.control, args.unrelated, args.questions)
    for path in map(Path, filter(None, (*paths, *args.transfer, *args.preference))):
        for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
            config["contents"][str(file)] = file.stat().st_size, file.stat().st_mtime_ns
    return json.loads(json.dumps(config))


def methods_to_run(args):
    """The methods to run, in order; ValueError for what would only fail after hours."""
    if not args.model or not args.data:
        raise ValueError("expected both --model DIR and --data FILE.jsonl")
    methods = {"naive", *args.methods}
    if args.unrelated and args.methods == DEFAULT:
        methods.add("kl")
    in_order(methods - {*SHORTER, *SMALLER}, args.unrelated)
    return [name for name in (*SHORTER, *SMALLER, *METHODS) if name in methods]


def other_answers(args):
    """[(name, chat rows, other answers to their prompts or [])] of --preference, --transfer."""
    if args.control:
        same_prompts(args.control, args.data)
    others = [(f"transfer_{Path(path).stem}", load_rows(path), []) for path in args.transfer]
    if len({name for name, *_ in others}) < len(others):
        raise ValueError("--transfer: expected files of different names")
    if args.preference:
        if len(args.preference) != 2:
            raise ValueError("--preference: expected two files, of unwanted answers and of others")
        others.append(("preference", *same_prompts(*args.preference)))
    return [(name, rows[:TRANSFER_ROWS], wanted[:TRANSFER_ROWS]) for name, rows, wanted in others]


def same_prompts(path, other):
    """The rows of both files; ValueError unless they have the same prompts, row by row."""
    rows, others = load_rows(path), load_rows(other)
    if [prompt_of(row) for row in rows] != [prompt_of(row) for row in others]:
        raise ValueError(f"{path}: expected the prompts of {other}, row by row")
    return rows, others


def table(runs):
    """The runs, [per seed {method: measurements}], in Markdown."""
    there = {name for result in runs[0].values() for name in result}
    compared = [name for name in sorted(there) if name.endswith(COMPARISONS)]
    columns = [name for name in (*COLUMNS, *compared) if name in there]
    lines = [["method", *columns], ["---"] * (len(columns) + 1)]
    for method in runs[0]:
        cells = [cell([run[method].get(column, {}) for run in runs]) for column in columns]
        lines.append([method, *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main():
    """Run the task that the command line asks for; write and print the table."""
    args = parse(Arguments)
    out, methods, others = Path(args.out), methods_to_run(args), other_answers(args)
    load_questions(args.questions)  # a fault in the file ends the run here
    judge = connect(args, out)
    config, runs = settings(args, judge), {}
    for seed in range(args.seed, args.seed + args.seeds):
        runs[seed] = one_seed(replace(args, seed=seed), methods, others, judge, config)
    text = table(list(runs.values()))
    (out / "table.md").write_text(text, encoding="utf-8")
    write_json(out / "results.json", {"task": args.task, "config": config, "seeds": runs})
    harm = next(name for name in HARM if name in runs[args.seed]["base"])
    draw(list(runs.values()), harm, HARM[harm], out / "tradeoff.png", CURVES.values())
    print(f"{text}wrote {out}/table.md, tradeoff.png, results.json")


if __name__ == "__main__":
    run(main)
