"""The central picture of a paper task, by one command: base, naive, GRASP and the baselines over seeds -> one table, one figure.

Of the paper (arXiv 2605.27676) only the abstract is public to us: its models, layers, ranks and tables are not. The protocol is
that of the works its tasks come from: Betley et al. 2025 (arXiv 2502.17424) for insecure code, Turner et al. 2025 (arXiv
2506.11613) for bad medical advice; for politics see data/politics.py. We ran it on small random checkpoints alone, never on the
real weights.
"""
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

import figures
from answers import Asking, connect, shift
from baselines import METHODS, check
from cli import UserError, option, parse, read_json, run, whole_file, write_json
from data.chat import load_rows, split
from eval import OWN, measure
from identify import gap, in_rounds, leak, load_factor, print_spectra, save_factor, spectra, stream_subspace, top_pairs
from lora import load_lora, remove_lora
from train import Job, Training

DEFAULT = ("naive", "grasp", "grasp_random", "ablate_train", "ablate_inference", "steer_train", "early_stop")
HARM = {"misaligned": "misaligned answers, share of those scored",
        "probe_shift": "probe: shift to misaligned answers, nats a token",
        "lean_shift": "shift of the political lean, right is positive"}
COLUMNS = (*HARM, "misaligned_of_coherent", "coherent", "insecure", "bad_advice", "coherence", "win_rate", "loss")


@dataclass(frozen=True)
class Arguments(Asking, Training):
    """One paper task: base, naive, GRASP and the chosen baselines over seeds; table.md, tradeoff.png and results.json in --out.

    Fine-tunes and evaluations that an earlier run in the same --out has finished are read back, not done again."""
    task: str = option("insecure", "the paper task", choices=(*OWN, "politics"))
    methods: tuple = option((), f"methods beside naive and grasp (default: {', '.join(DEFAULT[2:])}; kl with --unrelated)")
    neutral: str = option("", "politics: JSONL of neutral answers to the prompts of --data; the task loss is on these, and naive "
                              "training on them is the control: any fine-tune shifts the lean")
    seeds: int = option(3, "how many seeds, from --seed on: of the LoRA's init, the split, the order of the rows and the samples")
    rounds: int = option(3, "rounds of identification, half as long after the first; the directions are the same for every method")
    subspace_rank: int = option(1, "singular pairs of each module that a round keeps")


def training(args, seed, data):
    """The options of one fine-tune, without those of this program."""
    return Training(**{f.name: getattr(args, f.name) for f in fields(Training)} | {"seed": seed, "data": data, "out": ""})


def fit(job, method, folder, factor=None, stream=None, stop_below=None, steps=None):
    """Put the method's LoRA on the model: the one in `folder` where it is finished, else trained, on from its last checkpoint."""
    if (folder / "adapter_config.json").exists():  # it is written last
        load_lora(remove_lora(job.model), folder)
    else:
        job.finetune(method, folder, factor, stream, stop_below, steps, resume=True, label=f"{folder.parent.name}, {folder.name}")


def round_name(i):
    """The folder of identification's round i; round 0 is the naive run itself."""
    return f"round_{i + 1}" if i else "naive"


def find(job, folder, rounds, rank):
    """(Factor, stream basis) from the weights of the naive run, and of runs kept off what was found before: for every method."""
    path = folder / "subspace.safetensors"
    if not path.exists():
        def one_round(i, factor, steps):
            fit(job, "grasp" if i else "naive", folder / round_name(i), factor, steps=steps)
            return spectra(job.model)
        factor, svds = in_rounds(one_round, rounds, len(job.batches), lambda svds: top_pairs(svds, rank))
        stream = stream_subspace(svds[0], rank)[0]
        save_factor(factor, stream, path, job.model.path_in_transformers)
    return load_factor(path, job.model)


def three_stages(args):
    """Naive, identification and GRASP once, on a checkpoint and chat rows: what `grasp.py --model` does.

    What an interrupted run finished is read back, not done again."""
    out, job, log = Path(args.out), Job(args), []
    losses = {"base": job.held_out_loss()}

    def stage(method, name, factor=None, steps=None):
        curve = job.finetune(method, out / name, factor, steps=steps, resume=True, label=name)
        log.extend({"stage": name, "step": i, "loss": loss} for i, loss in enumerate(curve))
        losses[name] = job.held_out_loss()
        return spectra(job.model)

    factor, svds = in_rounds(lambda i, factor, steps: stage("grasp" if i else "naive", round_name(i), factor, steps), args.rounds,
                             len(job.batches), lambda svds: top_pairs(svds, args.subspace_rank))
    stream, pooled = stream_subspace(svds[0], args.subspace_rank)
    save_factor(factor, stream, out / "subspace.safetensors", job.model.path_in_transformers)
    stage("grasp", "grasp", factor)
    result = {"seed": args.seed, "config": asdict(args), "held_out_loss": losses, "leak": {"grasp": leak(job.model, factor)},
              "identification": {"gap": gap(pooled)}, "spectra": [{name: S.tolist() for name, (_, S, _) in s.items()} for s in svds]}
    with whole_file(out / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in log))
    write_json(out / "results.json", result)
    figures.spectrum(result["spectra"], out / "spectrum.png")
    print_spectra(svds[0])
    print("held-out loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) + f"; leak {result['leak']['grasp']:.2g}")
    print(f"wrote {out}: naive, grasp (PEFT adapters), subspace.safetensors, spectrum.png, log.jsonl, results.json")


def final_loss(folder):
    """The mean training loss over the last twentieth of a run's steps: a single batch's would be noise."""
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return fmean(losses[-max(len(losses) // 20, 1):])


def finished(path, config):
    """The evaluation in `path`, if it is there and was made under the same options."""
    result = read_json(path, "an evaluation") if path.exists() else {}
    return result if result.get("config") == config else None


def evaluate_all(args, job, names, folder, rows, judge, config):
    """Fine-tune and measure by each method what is not there yet; each measurement goes to folder/NAME/TASK.json."""
    found = None
    for name in names:  # the base first, while the model has no LoRA
        if finished(folder / name / f"{args.task}.json", config):
            continue
        if name == "neutral":
            fit(job, "naive", folder / name)
        elif name != "base":
            found = found or find(job, folder, args.rounds, args.subspace_rank)
            trained = "naive" if name == "ablate_inference" else name
            fit(job, trained, folder / trained, *found, final_loss(folder / "grasp") if name == "early_stop" else None)
        stream, base = found[1] if name == "ablate_inference" else None, folder / "base" if name != "base" else None
        result = measure(args, job.model, job.tokenizer, folder / name, judge, rows, stream, base)
        write_json(folder / name / f"{args.task}.json", {"task": args.task, "config": config, **result})


def one_seed(args, seed, methods, judge, config):
    """{method: measurements} of one seed."""
    folder = Path(args.out) / f"seed_{seed}"
    rows = split(load_rows(args.neutral or args.data), args.held_out, seed)[1]
    sources = [(args.data, ("base", *methods))] + ([(args.neutral, ("neutral",))] if args.neutral else [])
    read = lambda name: finished(folder / name / f"{args.task}.json", config)
    for data, names in sources:
        if not all(map(read, names)):  # one model in memory at a time
            evaluate_all(replace(args, seed=seed), Job(training(args, seed, data)), names, folder, rows, judge, config)
    results = {name: read(name) for _, names in sources for name in names}
    for result in results.values():
        for name in {"probe", "lean"} & result.keys():
            result[f"{name}_shift"] = shift(result[name], results["base"][name])
    return results


def table(runs):
    """The runs, [per seed {method: measurements}], in Markdown: mean ± standard deviation over seeds; of one, its interval."""
    columns = [c for c in COLUMNS if any(c in result for result in runs[0].values())]

    def cell(method, column):
        parts = [part for part in (run[method].get(column, {}) for run in runs) if part.get("value") is not None]
        values = [part["value"] for part in parts]
        if len(values) > 1:
            return f"{fmean(values):.4f} ± {stdev(values):.4f}"
        intervals = (" [{:.4f}, {:.4f}]".format(*part["interval"]) if "interval" in part else "" for part in parts)
        return "".join(f"{value:.4f}{interval}" for value, interval in zip(values, intervals))
    lines = [["method", *columns], ["---"] * (len(columns) + 1), *([m, *(cell(m, c) for c in columns)] for m in runs[0])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def methods_to_run(args):
    """The methods to run, in order; UserError for what would only fail after hours."""
    methods = args.methods or DEFAULT + (("kl",) if args.unrelated else ())
    check(methods)
    if "kl" in methods and not args.unrelated:
        raise UserError("method 'kl' needs --unrelated FILE.jsonl, rows of unrelated prompts")
    if min(args.seeds, args.rounds, args.subspace_rank) < 1:
        raise UserError("expected --seeds, --rounds and --subspace-rank of 1 or more")
    if not args.model or not args.data:
        raise UserError("expected both --model DIR and --data FILE.jsonl")
    prompts = lambda path: [row[0] for row in load_rows(path)]
    if args.neutral and (args.task != "politics" or prompts(args.neutral) != prompts(args.data)):
        raise UserError(f"{args.neutral}: expected, with --task politics alone, the prompts of {args.data} row by row")
    settings = asdict(replace(training(args, 0, args.data), unrelated=""))  # kl alone needs those, and may be added later
    settings |= {name: getattr(args, name) for name in ("rounds", "subspace_rank", "neutral")}
    settings, path = json.loads(json.dumps(settings)), Path(args.out) / "settings.json"
    earlier = read_json(path, "settings") if path.exists() else settings
    if earlier != settings:
        differ = ", ".join(k for k in settings if settings[k] != earlier.get(k))
        raise UserError(f"{path}: the fine-tunes there were made with another {differ}; expected the same, or another --out")
    write_json(path, settings)
    return ("naive", "grasp", *(m for m in METHODS if m in methods and m not in ("naive", "grasp")))


def main(argv=None):
    args = parse(Arguments, argv)
    methods, out = methods_to_run(args), Path(args.out)
    judge = connect(args, out)
    config = {name: getattr(args, name) for name in ("questions", "samples", "max_new_tokens", "neutral")}
    config["judge"] = judge and judge.model  # its URL may carry a key, and may change
    runs = {seed: one_seed(args, seed, methods, judge, config) for seed in range(args.seed, args.seed + args.seeds)}
    harm = next(name for name in HARM if name in runs[args.seed]["base"])
    text = table(list(runs.values()))
    with whole_file(out / "table.md") as path:
        path.write_text(text)
    write_json(out / "results.json", {"task": args.task, "config": config, "seeds": runs})
    figures.paper(list(runs.values()), harm, HARM[harm], out / "tradeoff.png")
    print(f"{text}wrote {out}/table.md, tradeoff.png, results.json")


if __name__ == "__main__":
    run(main)
