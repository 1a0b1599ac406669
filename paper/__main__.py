"""A paper task by one command: base, naive, GRASP and the baselines over seeds, a table, a figure.

Of the paper (arXiv 2605.27676) only the abstract is public to us: its models, layers, ranks and
tables are not. The protocol is that of the works its tasks come from: Betley et al. 2025 (arXiv
2502.17424) for insecure code, Turner et al. 2025 (arXiv 2506.11613) for bad medical advice; for
politics see politics.py. `grasp` is the abstract's method, `grasp_online` goes beyond it.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

from baselines.methods import METHODS, Found, runs_before
from baselines.stream import stream_subspace
from data.chat import load_rows, split
from identify import identify, spectra
from lora import load_lora, remove_lora
from paper.answers import Asking, connect
from paper.compare import COMPARED, COMPARISONS, CURVE, compare
from paper.measure import ANSWERS, OWN, TRANSFER_ROWS, measure
from paper.output import read_jsonl
from paper.questions import load_questions
from real.job import NOT_PART_OF_THE_RUN, RESULTS, Job, check_methods, read_looks
from real.settings import Training
from real.stages import final_loss
from support.errors import UserError, user_errors
from support.files import contents, read_json, whole_file, writable_folder, write_json
from support.options import option, parse
from support.program import run
from support.schema import from_json, show
from support.schema import value as bounded
from support.subspace import load_subspace, save_subspace

SHORTER = {"naive_quarter": 4, "naive_half": 2}  # naive, on a part of the steps
DEFAULT = (
    *SHORTER,
    "naive",
    "grasp",
    "grasp_online",
    "grasp_random",
    "ablate_train",
    "ablate_inference",
    "steer_train",
)
HARM = {
    "misaligned": "misaligned answers, share of those scored",
    "lean_shift": "shift of the political lean, right is positive",
    "probe_shift": "probe: shift to misaligned answers, nats a token",
}
COLUMNS = (
    "misaligned",
    "misaligned_of_coherent",
    "coherent",
    "insecure",
    "bad_advice",
    "coherence",
    "win_rate",
    "loss",
)


@dataclass(frozen=True)
class Arguments(Asking, Training):
    """One paper task: base, naive and the chosen methods over seeds.

    Leaves table.md, tradeoff.png and results.json in --out. Fine-tunes and evaluations that an
    earlier run in the same --out has finished are read back, not done again.
    """

    task: str = option("insecure", "the paper task", choices=(*OWN, "politics"))
    methods: tuple = option(
        (),
        f"methods beside naive (default: {', '.join(m for m in DEFAULT if m != 'naive')}; and kl, "
        "if there is --unrelated)",
    )
    control: str = option(
        "",
        "JSONL of unobjectionable answers to the prompts of --data; naive training on them is the "
        "control: any fine-tune shifts something; for politics the task loss is on these",
    )
    transfer: tuple = option(
        (),
        "comma-separated JSONL files of unwanted answers in other domains: how much likelier do "
        f"they get (the first {TRANSFER_ROWS} rows of each)",
    )
    preference: tuple = option(
        (),
        "two JSONL files, of unwanted and of unobjectionable answers to the same prompts: how much "
        f"likelier are the unwanted ones, row by row (the first {TRANSFER_ROWS} rows)",
    )
    seeds: int = option(
        3,
        "how many seeds, from --seed on: of the LoRA's init, the split, the order of the rows and "
        "the samples",
        low=1,
        high=1000,
    )
    subspace_rank: int = option(1, "singular pairs of each module that identification keeps", low=1)


# Fine-tunes: each in a folder SEED/METHOD, read back where it is finished.


def fit(job, method, folder, found=None):
    """Put the method's LoRA on the model: the one in `folder` if it is whole, else trained.

    A fine-tune that was interrupted goes on from its last checkpoint.
    """
    if method in SHORTER:
        job, method = job.shorter(SHORTER[method]), "naive"
    if (folder / "adapter_config.json").exists():  # it is written last
        with user_errors():
            load_lora(remove_lora(job.model), folder)
        return
    label = f"{folder.parent.name}, {folder.name}"
    job.finetune(method, folder, found, resume=True, label=label)


def directions(job, folder, rank):
    """(Factor, stream basis) from the weights of the naive run, once for every method of a seed."""
    path = folder / "subspace.safetensors"
    if not path.exists():
        fit(job, "naive", folder / "naive")
        with user_errors():
            factor = identify(job.model, rank)
            stream, _ = stream_subspace(spectra(job.model), rank)
        save_subspace(path, factor, stream, job.model.path_in_transformers)
    return load_subspace(path, job.model)


def found_for(job, method, folder, rank):
    """The Found that `method` uses; what it builds upon is trained where it is not there yet."""
    before = runs_before(method)
    if before == "naive":
        factor, stream = directions(job, folder, rank)
        return Found(factor=factor, stream=stream)
    if before == "grasp_online":
        online = folder / before
        fit(job, before, online)
        looks = read_looks(online / "looks.json", remove_lora(job.model))
        return Found(looks=looks, loss=final_loss(logged_losses(online)))
    return Found()


@dataclass(frozen=True)
class Step:
    """A line of a fine-tune's log."""

    loss: float


def logged_losses(folder):
    """The training loss of each step of a fine-tune that was finished in `folder`."""
    losses = []
    for where, line in read_jsonl(folder / "log.jsonl", "a step of a fine-tune"):
        losses.append(from_json(Step, line, where).loss)
    if not losses:
        raise UserError(f"{folder / 'log.jsonl'}: no steps, expected those of a fine-tune")
    return losses


# Evaluations: each in SEED/METHOD/TASK.json.


@dataclass(frozen=True)
class Measurement:
    """A share of an evaluation; there is no number where nothing could be counted."""

    value: float | None = bounded(None, low=0, high=1)
    interval: list[float] | None = None
    each: dict[str, float] | None = None

    def __post_init__(self):
        pair = self.interval
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            raise ValueError("an 'interval' is no pair, expected [low, high]")


@dataclass(frozen=True)
class Rate(Measurement):
    """A share of what was counted, with its interval."""

    def __post_init__(self):
        super().__post_init__()
        if self.value is not None and self.interval is None:
            raise ValueError("a share has no 'interval', expected [low, high]")


@dataclass(frozen=True, kw_only=True)
class Loss(Measurement):
    """The held-out loss, which every evaluation has."""

    value: float = bounded(low=0)
    interval: list[float] = bounded()


@dataclass(frozen=True, kw_only=True)
class Parts(Measurement):
    """A measurement that is compared part by part: question by question, or row by row."""

    value: float = bounded()
    each: dict[str, float] = bounded()


@dataclass(frozen=True)
class Evaluation:
    """What is read of a file TASK.json."""

    task: str
    config: dict


def finished(path, config):
    """The evaluation in `path`, if it is there and was made under the same options; else None.

    UserError where the file is no evaluation.
    """
    if not path.exists():
        return None
    result = read_json(path, "an evaluation")
    evaluation = from_json(Evaluation, result, path)
    if evaluation.config != config:
        return None
    if evaluation.task != path.stem:
        raise UserError(f"{path}: 'task' is {show(evaluation.task)}, expected '{path.stem}'")
    for name in ("loss", "probe"):
        if name not in result:
            raise UserError(f"{path}: no '{name}', expected it in every evaluation")
    for name in result:
        if name == "loss":
            from_json(Loss, result[name], path, name=name)
        elif name.startswith(COMPARED):
            from_json(Parts, result[name], path, name=name)
        elif name in COLUMNS:
            kind = Measurement if name == "coherence" else Rate
            from_json(kind, result[name], path, name=name)
            if "value" not in result[name]:
                raise UserError(f"{path}: no '{name}.value', expected a number or null")
    return result


def evaluate(args, job, name, folder, rows, others, judge):
    """The measurements of one method, or of "base" or "control", with the fine-tune before them."""
    stream = None
    if name == "control":
        fit(job, "naive", folder / name)
    elif name == "ablate_inference":  # the naive run, with hooks while it answers
        stream = found_for(job, name, folder, args.subspace_rank).stream
        fit(job, "naive", folder / "naive")
    elif name != "base":
        fit(job, name, folder / name, found_for(job, name, folder, args.subspace_rank))
    base = None if name == "base" else folder / "base"
    return measure(args, job.model, job.tokenizer, folder / name, judge, rows, stream, base, others)


def preference_rows(paths):
    """{"preference": the first chat rows of (unwanted, unobjectionable) answers}, if asked for."""
    if not paths:
        return {}
    if len(paths) != 2:
        raise UserError(
            f"--preference has {len(paths)} files, expected two: unwanted and unobjectionable "
            "answers to the same prompts"
        )
    check_answers(paths[1], paths[0])
    unwanted, wanted = (load_rows(path)[:TRANSFER_ROWS] for path in paths)
    return {"preference": (unwanted, wanted)}


def transfer_rows(paths):
    """{name: (the first chat rows, None)} of files of other domains."""
    rows = {}
    for path in paths:
        name = f"transfer_{Path(path).stem}"
        if name in rows:
            raise UserError(f"--transfer has two files of the name {path}, expected other names")
        if name.endswith(COMPARISONS):
            raise UserError(f"--transfer {path}: the name ends as a comparison's, expected another")
        rows[name] = load_rows(path)[:TRANSFER_ROWS], None
    return rows


def one_seed(args, seed, methods, others, judge, config):
    """{method: measurements} of one seed; what is on disk under the same options is read back."""
    args = replace(args, seed=seed)
    folder = Path(args.out) / f"seed_{seed}"
    task_rows = args.control if args.task == "politics" and args.control else args.data
    rows = split(load_rows(task_rows), args.held_out, seed, task_rows)[1]
    sources = {args.data: ("base", *methods)}  # the base first, while the model has no LoRA
    if args.control:
        sources[args.control] = ("control",)
    results = {}
    for data, names in sources.items():
        job = None  # one model in memory at a time, and none where all is there
        for name in names:
            path = folder / name / f"{args.task}.json"
            results[name] = finished(path, config)
            if results[name] is None:
                job = job or Job(training(args, seed, data))
                found = evaluate(args, job, name, folder, rows, others, judge)
                write_json(path, {"task": args.task, "config": config, **found})
                results[name] = finished(path, config)
    check_columns(results)
    compare(results)
    return results


def check_columns(results):
    """UserError where a method's evaluation lacks a column that the base's has."""
    columns = [name for name in COLUMNS if name in results["base"]]
    for method, result in results.items():
        for name in columns:
            if name not in result:
                raise UserError(
                    f"the evaluation of {method}: no '{name}', which the base has; delete the "
                    "file, and it is measured anew"
                )


def training(args, seed, data):
    """The options of one fine-tune, without those of this program."""
    options = {f.name: getattr(args, f.name) for f in fields(Training)}
    return Training(**{**options, "seed": seed, "data": data, "out": ""})


# The table and the command line.


def cell(parts):
    """One measurement over seeds in text: mean ± standard deviation; of one seed, its interval."""
    parts = [part for part in parts if part.get("value") is not None]
    values = [part["value"] for part in parts]
    if not values:
        return ""
    if len(values) > 1:
        return f"{fmean(values):.4f} ± {stdev(values):.4f}"
    if parts[0].get("interval") is None:
        return f"{values[0]:.4f}"
    low, high = parts[0]["interval"]
    return f"{values[0]:.4f} [{low:.4f}, {high:.4f}]"


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


def methods_to_run(args):
    """The methods to run, in order; UserError for what would only fail after hours."""
    methods = args.methods or DEFAULT
    if args.unrelated and not args.methods:
        methods = (*methods, "kl")
    check_methods(args, [method for method in methods if method not in SHORTER])
    if not args.model or not args.data:
        raise UserError("expected both --model DIR and --data FILE.jsonl")
    if args.control:
        check_answers(args.control, args.data)
    return tuple(m for m in (*SHORTER, *METHODS) if m == "naive" or m in methods)


def check_answers(path, other):
    """UserError unless `path` has other answers than `other` to the same prompts, row by row."""
    found, expected = load_rows(path), load_rows(other)
    if [prompt(row) for row in found] != [prompt(row) for row in expected]:
        raise UserError(f"{path}: expected the prompts of {other}, row by row")
    if found == expected:
        raise UserError(f"{path}: the answers are those of {other}, expected others")


def prompt(row):
    """The turns of a chat row before the first answer."""
    first = [turn["role"] for turn in row].index("assistant")
    return row[:first]


def check_settings(args, out):
    """UserError where the fine-tunes in `out` were made under other options; else keep these.

    Of the files that the options name, what is in them counts.
    """
    settings = asdict(training(args, 0, args.data))
    settings = {k: v for k, v in settings.items() if k not in NOT_PART_OF_THE_RUN}
    settings.update(subspace_rank=args.subspace_rank, control=args.control)
    for name in ("model", "data", "control", "unrelated"):
        if settings[name]:
            settings[f"contents of {name}"] = contents(settings[name])
    if not args.unrelated:  # kl alone needs it, and may be added later
        settings.pop("unrelated")
    settings = json.loads(json.dumps(settings))  # as the file has them
    path = out / "settings.json"
    if path.exists():
        earlier = from_json(dict, read_json(path, "settings"), path)
        if "unrelated" not in earlier:
            added = {name: value for name, value in settings.items() if name.endswith("unrelated")}
            earlier.update(added)
        differ = [name for name in settings if settings[name] != earlier.get(name)]
        if differ:
            raise UserError(
                f"{path}: the fine-tunes there were made with another {', '.join(differ)}; "
                "expected the same, or another --out"
            )
        settings = {**earlier, **settings}
    write_json(path, settings)


def main(argv=None):
    """Run the task that the command line asks for; write and print the table."""
    args = parse(Arguments, argv)
    methods = methods_to_run(args)
    others = {**preference_rows(args.preference), **transfer_rows(args.transfer)}
    names = ["settings.json", "judge.jsonl", "table.md", "results.json", "tradeoff.png"]
    out = writable_folder(args.out, names)
    measured = ("base", *methods, "control") if args.control else ("base", *methods)
    for seed in range(args.seed, args.seed + args.seeds):
        for name in measured:
            writable_folder(out / f"seed_{seed}" / name, [*RESULTS, f"{args.task}.json", *ANSWERS])
    check_settings(args, out)
    load_questions(args.questions or None)  # a fault in the file ends the run here
    judge = connect(args, out)
    files = (args.questions, *args.transfer, *args.preference)  # settings.json has the control
    config = {
        "questions": args.questions,
        "samples": args.samples,
        "max_new_tokens": args.max_new_tokens,
        "control": args.control,
        "transfer": list(args.transfer),
        "preference": list(args.preference),
        "contents": {path: contents(path) for path in files if path},
        "judge": judge and judge.model,  # not its URL, which may carry a key, and may change
    }
    runs = {}
    for seed in range(args.seed, args.seed + args.seeds):
        runs[seed] = one_seed(args, seed, methods, others, judge, config)
    text = table(list(runs.values()))
    with whole_file(out / "table.md") as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file's odd name
    write_json(out / "results.json", {"task": args.task, "config": config, "seeds": runs})
    draw(list(runs.values()), out / "tradeoff.png")
    print(f"{text}wrote {out}/table.md, tradeoff.png, results.json")


def draw(runs, path):
    """The figure: harm over the task's loss, a mark for each method."""
    from experiments import figures  # matplotlib is loaded where there is something to draw

    harm = next(name for name in HARM if name in runs[0]["base"])
    figures.paper(runs, harm, HARM[harm], path, CURVE)


if __name__ == "__main__":
    run(main)
