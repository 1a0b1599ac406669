"""A checkpoint and chat rows, ready for fine-tunes; the command line of train.py."""

import copy
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from baselines.methods import METHODS, NEEDS, Found, check, recipe
from baselines.stream import stream_subspace
from data.chat import batches, encode_rows, load_rows, split
from data.tokenizer import Tokenizer
from identify import leak, spectra
from lora import add_lora, lora_modules, remove_lora, save_lora
from model import GPT
from real.losses import nats
from real.null import input_nulls
from real.settings import Training
from support.checkpoint import Checkpoint
from support.errors import UserError, user_errors
from support.files import read_json, writable_folder, write_json
from support.options import option, parse, pick_device
from support.processes import process_group, shard
from support.program import run
from support.schema import from_json, show, value
from support.subspace import load_subspace, save_subspace
from train import Optimisation, finetune

# Options that change no step of a fine-tune. Of the files that --subspace and --looks name, what is
# in them is part of the run.
NOT_PART_OF_THE_RUN = ("out", "resume", "micro_batch", "checkpointing", "device", "methods")
NOT_PART_OF_THE_RUN += ("seeds", "quick", "subspace_rank", "subspace", "looks")
FEEDS = {  # {option: what of Found it gives}
    "subspace": ("factor", "stream"),
    "looks": ("looks",),
    "until_loss": ("loss",),
    "unrelated": ("unrelated",),
}
RESULTS = (
    "log.jsonl",
    "checkpoint.pt",
    "looks.json",
    "subspace.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "results.json",
)


def digest(tensors):
    """A fingerprint of tensors that tells other weights or rows from the same ones."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(len(flat) // 4096, 1)]  # a stride: all of a 7B model would take minutes
        sha.update(some.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def fingerprint(found):
    """The same for a part of what was found: a dictionary of tensors, tensors, or numbers."""
    if isinstance(found, dict):
        return {name: digest([U]) for name, U in found.items()}
    if isinstance(found, torch.Tensor):
        return digest([found])
    if isinstance(found, tuple):
        return digest(found)
    return found


class Job:
    """A model, its tokenizer, and rows to train on and held out; fine-tunes differ in their method.

    UserError for whatever does not fit together, before any work.
    """

    def __init__(self, args):
        if not args.model or not args.data:
            raise UserError("expected both --model DIR and --data FILE.jsonl")
        self.args = args
        device, dtype = pick_device(args.device, args.dtype)
        self.tokenizer = Tokenizer.from_folder(args.model)
        self.model = GPT.from_pretrained(args.model, "cpu" if args.shard else device, dtype)
        self.weights_digest = digest(self.model.parameters())
        if args.shard:
            shard(self.model, device)
        self.targets = args.targets or ("all-linear",)
        self.attach()  # a rank or a target that does not fit ends the run here
        remove_lora(self.model)
        self.model.checkpointing = args.checkpointing
        self.max_len = min(args.max_len, self.model.config.max_len)
        self.train, self.held_out = split(self.read(args.data), args.held_out, args.seed, args.data)
        self.batches = self.plan()
        self.unrelated = None
        if args.unrelated:
            rows = self.read(args.unrelated)
            self.unrelated = next(batches(rows, args.batch_size, args.seed, 0))
            print(f"{len(self.unrelated[0])} of them in the penalty of every step")
        print(f"{args}\non {device}, base in {dtype}")
        print(
            f"{len(self.train)} rows to train on, {len(self.held_out)} held out, "
            f"{len(self.batches)} steps"
        )

    def read(self, path):
        """The rows of a file as [(ids, mask)]."""
        examples, n_cut = encode_rows(self.tokenizer, load_rows(path), self.max_len)
        print(f"{path}: {len(examples)} rows, {n_cut} cut to {self.max_len} tokens")
        n_embedded = self.model.config.vocab_size
        for i, (ids, _) in enumerate(examples):
            if ids.max() >= n_embedded:
                raise UserError(
                    f"{path}: row {i + 1} has token {ids.max()}, the embedding ends at {n_embedded}"
                )
        return examples

    def plan(self):
        """The batches of all epochs, or of the first --max-steps steps."""
        args, plan = self.args, []
        for epoch in range(args.epochs):
            plan += batches(self.train, args.batch_size, args.seed, epoch)
            if args.max_steps and len(plan) >= args.max_steps:
                return plan[: args.max_steps]
        return plan

    def shorter(self, part):
        """The same job on the first 1/part of the steps; the rate decays to 0 over these."""
        job = copy.copy(self)
        job.batches = self.batches[: max(len(self.batches) // part, 1)]
        job.args = replace(self.args, max_steps=len(job.batches))
        return job

    def to_device(self, batch):
        """A batch's tensors, where the model is."""
        device = self.model.embed_tokens.weight.device
        return tuple(part.to(device) for part in batch)

    def batch_at(self, step):
        """Tokens and mask (B, T) of a step, where the model is."""
        return self.to_device(self.batches[step])

    def attach(self):
        """A fresh LoRA on the base model."""
        args = self.args
        with user_errors():
            remove_lora(self.model)
            add_lora(
                self.model, args.rank, args.alpha, self.targets, args.scaling == "rslora", args.seed
            )

    def finetune(self, method, folder, found=None, resume=False, label=None):
        """Attach a fresh LoRA, train it by `method`, leave it on the model; return the Fit.

        The folder gets log.jsonl, a checkpoint to resume from, and last the PEFT adapter.
        """
        args = self.args
        check_whole(Path(folder))
        self.attach()
        found = found or Found()
        found = on_adapted(self.model, method, found)
        if self.unrelated is not None:
            found = replace(found, unrelated=self.to_device(self.unrelated))
        if method == "grasp_random":
            check_moments(found.looks, args.look_every, len(self.batches))
        if method == "grasp_online":
            if args.rank == 1:
                print("nothing can stand out at --rank 1: this run is a naive one")
            if args.look_every > len(self.batches):
                print(
                    f"no look in {len(self.batches)} steps, with --look-every {args.look_every}: "
                    "this run is a naive one"
                )
            found = replace(found, nulls=input_nulls(self.model, *self.batch_at(0)))
        added = recipe(method, self.model, self.batch_at(0), found, args.seed)
        added = replace(added, look_every=args.look_every)
        options = Optimisation(
            steps=len(self.batches),
            lr=args.lr,
            weight_decay=args.weight_decay,
            warmup=args.warmup,
            micro_batch=args.micro_batch,
        )
        checkpoint = Checkpoint(folder, self.run_config(method, found), resume)
        label = label or method
        fit = finetune(self.model, self.batch_at, options, added, checkpoint, label=label)
        for name, m in lora_modules(self.model).items():
            if not (m.lora_A.norm() * m.lora_B.norm() * m.scaling).isfinite():
                raise UserError(
                    f"{label}: the update of {name} is not finite; try a lower --lr or --alpha"
                )
        if method == "grasp_online":
            self.save_found(folder, fit)
        save_lora(self.model, folder)  # last: where it is, the run is finished
        return fit

    def run_config(self, method, found):
        """All that a checkpoint's next step depends on: options, weights, rows, what was found."""
        config = {k: v for k, v in asdict(self.args).items() if k not in NOT_PART_OF_THE_RUN}
        config["method"] = method
        config["weights"] = self.weights_digest
        config["rows"] = digest(part for row in self.train for part in row)
        if method in NEEDS:
            name, _ = NEEDS[method]
            config["found"] = fingerprint(getattr(found, name))
        return json.loads(json.dumps(config))

    def save_found(self, folder, fit):
        """What grasp_online found: looks.json, and subspace.safetensors if anything stood out."""
        folder = Path(folder)
        write_json(folder / "looks.json", fit.looks)
        if fit.factor:
            stream, _ = stream_subspace(spectra(self.model))
            path = folder / "subspace.safetensors"
            save_subspace(path, fit.factor, stream, self.model.path_in_transformers)

    def held_out_loss(self):
        """Nats a response token on the held-out rows."""
        sums, counts = nats(self.model, self.held_out)
        return (sums.sum() / counts.sum()).item()


@dataclass(frozen=True)
class Arguments(Training):
    """One fine-tune on chat rows: leaves a PEFT adapter, log.jsonl, a checkpoint to resume from."""

    method: str = option("grasp_online", "what is added to the loop", choices=METHODS)
    subspace: str = option("", "file of found directions that identify.py writes, for grasp, ...")
    looks: str = option("", "looks.json of a grasp_online run, for grasp_random")
    until_loss: float = option(0.0, "the training loss at which early_stop ends", low=0)
    resume: bool = option(False, "continue the run in --out, bit for bit")


def check_whole(folder):
    """UserError where an adapter is that no checkpoint belongs to: it would be trained anew."""
    if (folder / "adapter_config.json").exists() and not (folder / "checkpoint.pt").exists():
        raise UserError(
            f"{folder}: has an adapter but no checkpoint.pt of its run; expected another --out"
        )


def check_methods(args, methods):
    """UserError for what would only fail after the first fine-tunes of several."""
    check(methods)
    if "kl" in methods and not args.unrelated:
        raise UserError("method 'kl' needs --unrelated FILE.jsonl, rows of unrelated prompts")
    if args.subspace_rank > args.rank:
        raise UserError(
            f"--subspace-rank is {args.subspace_rank}, expected at most --rank, {args.rank}"
        )


def check_out(args):
    """Try --out before hours of work; UserError where a run is there that would be lost."""
    out = writable_folder(args.out, RESULTS)
    if args.resume:
        return
    for name, state in (("adapter_config.json", "a finished"), ("checkpoint.pt", "an interrupted")):
        if (out / name).exists():
            raise UserError(f"{out}: holds {state} run; expected --resume, or another --out")


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A line of looks.json, as far as the control needs it."""

    step: int = value(low=1)
    joined: dict[str, int] = value(low=1)


def read_looks(path, model):
    """The looks of a grasp_online run on this model, as train.py writes them."""
    looks = read_json(path, "the looks of a grasp_online run")
    names = dict(model.named_modules())
    last, total = 0, Counter()
    for look in from_json(list[_Look], looks, path):
        if look.step <= last:
            raise UserError(f"{path}: step {look.step} after step {last}, expected them in order")
        last = look.step
        total.update(look.joined)
        for name in look.joined:
            width = getattr(names.get(name), "out_features", 0)
            if total[name] > width:
                raise UserError(
                    f"{path}: {total[name]} directions joined {show(name)} by step {look.step}, "
                    f"expected at most {width} (of a linear layer of this model)"
                )
    return looks


def say_unused(args):
    """Print which of the options that feed a method the chosen one does not use."""
    needed, _ = NEEDS.get(args.method, ("", ""))
    for name, gives in FEEDS.items():
        if getattr(args, name) and needed not in gives:
            print(f"--{name.replace('_', '-')} is given, but not used by --method {args.method}")


def read_found(args, model):
    """What the files that the options name have to offer."""
    factor = stream = looks = None
    if args.subspace:
        factor, stream = load_subspace(args.subspace, model)
    if args.looks:
        looks = read_looks(args.looks, model)
    return Found(factor, stream, looks, loss=args.until_loss or None)


def on_adapted(model, method, found):
    """What was found, as far as it is about the adapted modules.

    UserError where nothing of what the method needs is.
    """
    adapted = lora_modules(model)
    name, _ = NEEDS.get(method, ("", ""))
    if name == "factor" and found.factor is not None:
        factor = {name: U for name, U in found.factor.items() if name in adapted}
        if not factor:
            raise UserError(
                f"the found directions are of {endings(found.factor)}, but the LoRA is on "
                f"{endings(adapted)}: nothing would be constrained"
            )
        return replace(found, factor=factor)
    if name == "looks" and found.looks is not None:
        for look in found.looks:
            others = look["joined"].keys() - adapted.keys()
            if others:
                raise UserError(
                    f"the looks are of {endings(others)} too, but the LoRA is on "
                    f"{endings(adapted)}: expected the looks of a run with the same --targets"
                )
    return found


def check_moments(looks, every, steps):
    """UserError where the control would not replay all looks of the run that it stands beside."""
    for look in looks or ():
        if look["step"] % every or look["step"] > steps:
            raise UserError(
                f"the looks have step {look['step']}, but this run looks every {every} of its "
                f"{steps} steps; expected the --look-every and the length of the run they are of"
            )


def endings(names):
    """The last parts of the modules' names, each once."""
    return ", ".join(sorted({name.split(".")[-1] for name in names}))


def constrained(model, factor):
    """How many of the adapted modules a factor constrains, in words."""
    adapted = set(lora_modules(model))
    return f"{len(adapted & set(factor))} of {len(adapted)} modules constrained"


def main():
    """The command line of train.py."""
    args = parse(Arguments)
    check_out(args)
    say_unused(args)
    job = Job(args)
    fit = job.finetune(args.method, args.out, read_found(args, job.model), args.resume)
    result = {
        "config": asdict(args),
        "loss": fit.losses[-1],
        "held_out_loss": job.held_out_loss(),
        "looks": fit.looks,
    }
    text = f"training loss {fit.losses[0]:.4f} -> {fit.losses[-1]:.4f}, "
    text += f"held-out loss {result['held_out_loss']:.4f}"
    if fit.factor:
        result["leak"] = leak(job.model, fit.factor)
        text += f", {constrained(job.model, fit.factor)}, leak {result['leak']:.2g}"
    write_json(Path(args.out) / "results.json", result)
    print(f"{text}; wrote {args.out}")


def program():
    """The command line, with its errors in one line each; torchrun may start it."""
    run(main, process_group())
