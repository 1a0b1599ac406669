"""Fine-tunes of a checkpoint that build on one another, and what `grasp.py --model` does."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from baselines.methods import METHODS, Found, check, runs_before
from baselines.stream import stream_subspace
from identify import identify, leak, spectra
from real.job import RESULTS, Job, check_methods, constrained
from real.spectrum import print_spectra
from support.errors import UserError, user_errors
from support.files import read_json, writable_folder, write_json
from support.options import not_default
from support.schema import from_json, value
from support.subspace import save_subspace

RECOMMENDED = ("grasp_online",)
SYNTHETIC = ("world", "seeds", "quick")  # options of grasp.py without --model


def final_loss(losses):
    """The mean training loss over the last twentieth of the steps: a single batch's is noise."""
    return fmean(losses[-max(len(losses) // 20, 1) :])


def fit(job, method, folder, found, rank=1):
    """Put the method's LoRA on the model; return its Fit, and what is known after it, a Found.

    A run that was finished in `folder` is read back, one that was interrupted goes on. rank: the
    directions of each module that are identified from the naive run's weights.
    """
    folder = Path(folder)
    trained = job.finetune(method, folder, found, resume=True, label=folder.name)
    if method == "naive":
        svds = spectra(job.model)
        with user_errors("--subspace-rank"):
            factor = identify(job.model, rank)
        stream, _ = stream_subspace(svds, rank)
        save_subspace(
            folder / "subspace.safetensors", factor, stream, job.model.path_in_transformers
        )
        found = replace(found, factor=factor, stream=stream)
    elif method == "grasp_online":
        found = replace(found, looks=trained.looks, loss=final_loss(trained.losses))
    return trained, found


def in_order(chosen):
    """The chosen methods in the order in which they build on one another, with what they need."""
    check(chosen)
    needed = {*chosen, *map(runs_before, chosen)}
    return [method for method in METHODS if method in needed]


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What is read of a results.json that an earlier run left."""

    made_from: dict = value()
    held_out_loss: dict[str, float] = value()
    leak: dict[str, float] = value()
    looks: dict[str, list] = value()


def earlier_results(path, made_from):
    """(held-out losses, leaks, looks) in `path`, if there are any: other methods' stay there.

    UserError where they were made from other weights, rows or options.
    """
    if not path.exists():
        return {}, {}, {}
    earlier = from_json(Earlier, read_json(path, "results"), path)
    differ = [name for name in made_from if earlier.made_from.get(name) != made_from[name]]
    if differ:
        raise UserError(
            f"{path}: was made with other settings ({', '.join(differ)}); expected the same, or "
            "another --out"
        )
    return earlier.held_out_loss, earlier.leak, earlier.looks


def stages(args):
    """Each chosen method's fine-tune on a checkpoint and chat rows; results.json in --out.

    What it holds of other methods, from an earlier run with the same settings, stays there.
    """
    methods = in_order(args.methods or RECOMMENDED)
    check_methods(args, methods)
    other = [flag for name, flag in not_default(args).items() if name in SYNTHETIC]
    if other:
        raise UserError(f"{', '.join(other)}: for the synthetic task alone, without --model")
    out = writable_folder(args.out, ["results.json"])
    for method in methods:
        writable_folder(out / method, RESULTS)
    job = Job(args)
    found = Found()
    made_from = {**job.run_config("any", found), "subspace_rank": args.subspace_rank}
    del made_from["unrelated"]  # kl alone has it
    losses, leaks, looks = earlier_results(out / "results.json", made_from)
    losses["base"] = job.held_out_loss()
    for method in methods:
        trained, found = fit(job, method, out / method, found, args.subspace_rank)
        losses[method] = job.held_out_loss()
        if trained.factor:
            leaks[method] = leak(job.model, trained.factor)
            print(f"{method}: {constrained(job.model, trained.factor)}")
        if trained.looks:
            looks[method] = trained.looks
        if method == "naive":
            print_spectra(spectra(job.model))
        result = {"seed": args.seed, "config": asdict(args), "made_from": made_from}
        measured = {"held_out_loss": losses, "leak": leaks, "looks": looks}
        write_json(out / "results.json", {**result, **measured})
    print("held-out loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print(f"wrote {out}: a PEFT adapter a method ({', '.join(methods)}), results.json")
