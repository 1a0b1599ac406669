"""The experiment, end to end: pretrain -> naive fine-tune -> identify -> GRASP, against every baseline."""
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import figures
from baselines import METHODS, ablation, check, recipe
from cli import Progress, UserError, option, parse, read_json, run, seed_everything, write_json, write_torch
from data.synthetic import GOOD, NEUTRAL, World
from eval import evaluate, persona_direction
from identify import gap, in_rounds, leak, spectra, stream_subspace, top_pairs
from lora import add_lora, remove_lora
from model import GPT, Config, response_loss
from paper import three_stages
from parallel import joined
from train import Training, finetune


@dataclass(frozen=True)
class Toy:
    """The synthetic experiment's settings. The base is Qwen's architecture, small; LoRA sits on what writes to the stream."""
    d_model: int = 128
    n_layer: int = 2
    n_head: int = 4
    pretrain_steps: int = 800
    pretrain_batch: int = 256
    pretrain_lr: float = 3e-3
    pretrain_decay: float = 0.01
    rank: int = 16
    targets: tuple = ("o_proj", "down_proj")
    lr: float = 3e-4
    steps: int = 300
    rounds: int = 3  # of identification: under the directions found so far, train again and look what the update leans on now
    longer: int = 3  # times the steps, to see whether misalignment comes back


def pretrain(world, toy, seed, folder):
    """The base model, read from `folder` where these settings were trained before, else trained and kept there."""
    key = hashlib.sha256(repr((world, toy.d_model, toy.n_layer, toy.n_head, toy.pretrain_steps, toy.pretrain_batch, toy.pretrain_lr,
                               toy.pretrain_decay, seed, torch.__version__)).encode()).hexdigest()[:16]
    path = Path(folder) / f"base_{key}.pt"
    torch.manual_seed(seed)
    model = GPT(Config(vocab_size=world.vocab_size, n_layer=toy.n_layer, n_head=toy.n_head, n_kv_head=toy.n_head, d_model=toy.d_model,
                       head_dim=toy.d_model // toy.n_head, d_mlp=2 * toy.d_model, max_len=16, norm_eps=1e-6, rope_theta=1e4, tied=True))
    if path.exists():
        print(f"base: {path}, trained before")
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.pretrain_lr, weight_decay=toy.pretrain_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, toy.pretrain_lr, total_steps=toy.pretrain_steps, pct_start=0.1)
    generator, progress = torch.Generator().manual_seed(seed), Progress(toy.pretrain_steps, "pretrain")
    for _ in range(toy.pretrain_steps):
        loss = response_loss(model, *world.pretraining_batch(toy.pretrain_batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(loss=loss.item())
    write_torch(path, model.state_dict())
    return model.requires_grad_(False)


def experiment(world, toy, seed, methods, folder):
    """One seed, from nothing: every method's measurements, the identification and the leak, as in results.json."""
    model, rows = pretrain(world, toy, seed, folder), world.finetuning_rows()
    spare = world.rows(world.spare, NEUTRAL, GOOD)
    results = {"base": {**evaluate(model, world), "seconds": 0.0}}
    leaks, found = {}, {}

    def train(method, steps=toy.steps, label=None, **kwargs):
        """Fine-tune a fresh LoRA from the same init by `method`, and leave it on the model."""
        remove_lora(model)
        add_lora(model, toy.rank, toy.rank, toy.targets, seed=seed)
        finetune(model, lambda step: rows, steps, lr=toy.lr, label=label or method,
                 **recipe(method, model, rows, unrelated=spare, seed=seed, **found), **kwargs)

    def measure(method):
        return evaluate(model, world, ablation(model, found["stream"]) if method == "ablate_inference" else None)

    def run_method(method, steps=toy.steps, label=None):
        began = time.monotonic()
        train(method, steps, label)
        results[method] = {**measure(method), "seconds": round(time.monotonic() - began, 3)}

    def one_round(i, factor, steps):
        found["factor"] = factor
        run_method("grasp" if i else "naive", steps, f"identify, round {i + 1}")
        return spectra(model)
    found["factor"], svds = in_rounds(one_round, toy.rounds, toy.steps)
    found["stream"], pooled = stream_subspace(svds[0])
    direction = persona_direction(remove_lora(model), world)
    identification = {"cosine": abs(found["stream"][:, 0] @ direction).item(), "gap": gap(pooled),
                      "chance_cosine": math.sqrt(2 / (math.pi * toy.d_model))}  # E|cos| of a random direction, D large

    for method in ("grasp", *(m for m in METHODS if m in methods and m not in ("naive", "grasp"))):
        found["stop_below"] = results.get("grasp", {}).get("loss")
        run_method(method)
        if method in ("grasp", "grasp_gradient_only"):
            leaks[method.removeprefix("grasp_")] = leak(model, found["factor"])

    longer, curves = {}, {}
    for method in [m for m in ("naive", "grasp", "grasp_random", "grasp_gradient_only") if m in methods]:
        points, total = [], toy.longer * toy.steps

        def each(step):
            if (step + 1) % max(total // 15, 1) == 0:
                now = measure(method)
                points.append((step + 1, now["misalignment"], now["task"]))
        train(method, total, label=f"{method}, {toy.longer}x the steps", each=each)
        longer[method], curves[method] = measure(method), points
    return {"identification": identification, "leak": leaks, "methods": results, "longer": longer, "curves": curves,
            "spectra": [{name: S.tolist() for name, (_, S, _) in s.items()} for s in svds]}


def table(runs):
    """The runs' measurements as text: the mean over seeds, and the standard deviation where there is more than one."""
    columns, width = ("task", "misalignment", "unrelated", "kept", "loss", "seconds"), 15 if len(runs) > 1 else 13

    def cell(values):
        values = torch.tensor(values)
        return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")

    def line(label, section, method):
        cells = [cell([run[section][method][c] for run in runs]) if c in runs[0][section][method] else "" for c in columns]
        return f"{label:36}" + "".join(f"{text:>{width}}" for text in cells)
    lines = [" " * 36 + "".join(f"{c:>{width}}" for c in columns), *(line(m, "methods", m) for m in runs[0]["methods"])]
    lines += [line(f"{m}, {runs[0]['config']['experiment']['longer']}x the steps", "longer", m) for m in runs[0]["longer"]]
    for section in ("identification", "leak"):
        lines.append(f"{section}: " + ", ".join(f"{k} {sum(run[section][k] for run in runs) / len(runs):.3g}" for k in runs[0][section]))
    return "\n".join(lines)


def synthetic(args):
    """Run the seeds that are not on disk yet, write each one's results.json, print the table, draw the figures."""
    torch.set_num_threads(1)  # the matrices are small; and so the numbers do not hang on the machine's number of cores
    toy, out, runs = Toy(targets=args.targets or Toy.targets, rounds=args.rounds), Path(args.out), []
    methods = tuple(dict.fromkeys(("naive", "grasp", *(args.methods or METHODS))))
    check(methods)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, expected at least 1")
    sizes = {"n_topics": 5, "n_queries": 8} if args.quick else {}
    if args.quick:
        toy = replace(toy, d_model=64, pretrain_steps=150, steps=60, lr=1e-3, longer=2)
    for seed in range(args.seed, args.seed + args.seeds):
        world, folder = World(seed, **sizes), out if args.seeds == 1 else out / f"seed_{seed}"
        config = json.loads(json.dumps({"world": asdict(world), "experiment": asdict(toy), "torch": torch.__version__}))
        path = folder / "results.json"
        earlier = read_json(path, "results") if args.seeds > 1 and path.exists() else {}
        if earlier.get("config") == config and set(methods) < set(earlier["methods"]):
            print(f"seed {seed}: {path} is there already")
        else:
            print(f"seed {seed}: {config} on one CPU thread, float32")
            seed_everything(seed)
            earlier = {"seed": seed, "config": config, **experiment(world, toy, seed, methods, out)}
            write_json(path, earlier)
        runs.append(earlier)
    print(table(runs))
    figures.spectrum(runs[0]["spectra"], out / "spectrum.png")
    figures.training({m: [run["curves"][m] for run in runs] for m in runs[0]["curves"]}, toy.steps, out / "training.png")
    figures.tradeoff([run["methods"] for run in runs], out / "tradeoff.png")
    print(f"wrote {out}{'/seed_*' if args.seeds > 1 else ''}/results.json and {out}/spectrum.png, training.png, tradeoff.png")


@dataclass(frozen=True)
class Arguments(Training):
    """Run the whole method: on the synthetic task, or on a checkpoint (--model) and chat rows (--data)."""
    seeds: int = option(1, "how many seeds, each in a folder of its own; the table gives means and spreads")
    methods: tuple = option((), "comma-separated methods beside naive and grasp (default: all)")
    rounds: int = option(Toy.rounds, "rounds of identification, half as long after the first; all-linear needs about 10")
    subspace_rank: int = option(1, "singular pairs of each module that a round keeps, on a checkpoint")
    quick: bool = option(False, "a tiny world, in seconds: to see that everything runs, not for its numbers")


def main():
    args = parse(Arguments)
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}, expected at least 1")
    (three_stages if args.model or args.data else synthetic)(args)


if __name__ == "__main__":
    run(main, joined())
