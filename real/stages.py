"""Fine-tunes of a checkpoint that build on one another: what `grasp.py --model` does."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from baselines.methods import METHODS, Found
from baselines.stream import ablation, stream_subspace
from identify import identify, spectra
from lora import lora_factors
from real.adapter import load_patterns, save_patterns
from real.checkpoint import Checkpoint
from real.job import NEEDS, Job, Training
from support.files import write_json
from support.options import option, parse

GIVES = {"patterns": "naive", "stream": "naive", "looks": "grasp_online", "loss": "grasp_online"}


def in_order(chosen, unrelated=""):
    """The chosen methods and those whose runs they build on, in order; ValueError for a mistake."""
    for method in chosen:
        if method not in METHODS:
            raise ValueError(f"method '{method}' is unknown, expected some of {', '.join(METHODS)}")
        if method == "kl" and not unrelated:  # here, and not after hours
            raise ValueError("method 'kl' needs --unrelated FILE.jsonl, rows of unrelated prompts")
    needed = {*chosen, *(GIVES.get(NEEDS.get(method)) for method in chosen)}
    return [method for method in METHODS if method in needed]


def fit(job, method, folder, found, rank=1):
    """Put the method's LoRA on the model; return its Fit, and what is known after it, a Found."""
    trained = job.finetune(method, folder, found)
    if method == "naive":
        path = Path(folder) / "subspace.safetensors"
        if not path.exists():  # else used as it is, such as identify.py's
            svds = spectra(lora_factors(job.model))
            stream, _ = stream_subspace(svds, rank)
            save_patterns(path, identify(svds, rank), stream, job.model.path_in_transformers)
        print(f"the patterns of {path}")
        patterns, stream = load_patterns(path, job.model)
        found = replace(found, patterns=patterns, stream=stream)
    elif method == "grasp_online":
        last = trained.losses[-max(len(trained.losses) // 20, 1) :]  # a single batch's is noise
        found = replace(found, looks=trained.looks, loss=fmean(last))
    return trained, found


@dataclass(frozen=True)
class Arguments(Training):
    """The method on a checkpoint and chat rows. The same command again goes on, bit for bit."""

    methods: tuple = option(("naive", "grasp", "grasp_online"), f"of {', '.join(METHODS)}")
    pattern_rank: int = option(1, "patterns of each module that are identified in the naive run")


def main():
    """The command line of `grasp.py --model`."""
    args = parse(Arguments)
    methods, out = in_order(args.methods, args.unrelated), Path(args.out)
    config = {name: value for name, value in asdict(args).items() if name != "methods"}
    results = Checkpoint(out, config).read("results.json")
    results = results or {"config": config, "held_out_loss": {}, "leak": {}, "looks": {}}
    job, found = Job(args), Found()
    results["held_out_loss"]["base"] = job.held_out_loss()
    for method in methods:  # naive and what `fit` identifies in it, GRASP kept off that, the others
        trained, found = fit(job, method, out / method, found, args.pattern_rank)
        ablated = method == "ablate_inference"  # a naive run, with hooks while it is measured
        with ablation(job.model, found.stream) if ablated else nullcontext():
            results["held_out_loss"][method], results["leak"][method] = job.report(trained, method)
        results["looks"][method] = trained.looks
        write_json(out / "results.json", results)
    print("held-out loss", {m: round(loss, 4) for m, loss in results["held_out_loss"].items()})
