"""What settled the formulation: variants of GRASP on the synthetic task, one row each.

The method keeps an update off the factor on its output side, U' B = 0, and looks at it every ten
steps. Here are the other choices: the input side (A V = 0, which has no place in the loop and lives
in this file), both sides, one look, more pairs, other intervals, other ranks, shorter naive runs.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from baselines.methods import recipe
from baselines.stream import stream_subspace
from data.synthetic import World
from eval import evaluate
from experiments.runs import Finished, Rates, attach, start, train
from grasp import Toy
from identify import joined, spectra, top_directions
from real.settings import SEED, SEEDS
from support.errors import UserError
from support.options import option, parse
from support.program import run
from support.progress import Progress
from support.schema import value
from train import Recipe, project_

NEVER = "never"
ONCE = "once, at a naive run's weights"
ACTIVATIONS = "once, at the base model's activations"
ONLINE = "while it trains"
WATCHING = "while it trains, and changes nothing"

OUTPUT = ("output",)
INPUT = ("input",)
BOTH = ("output", "input")


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune: when it looks, and what becomes of what it sees."""

    name: str
    looks: str = NEVER
    sides: tuple = OUTPUT  # of a module, that the constraint holds on
    pairs: int = 1  # of each module, where it looks once
    naive_share: float = 1.0  # of the usual steps: the length of the naive run that it looks at
    look_every: int = 10  # steps, where it looks while it trains
    rank: int | None = None  # of the LoRA; None: the toy's


VARIANTS = (
    Variant("naive"),
    Variant("naive, rank 8", rank=8),
    Variant("naive, rank 32", rank=32),
    Variant("one look, output side", ONCE),  # grasp
    Variant("one look, input side", ONCE, INPUT),
    Variant("one look, both sides", ONCE, BOTH),
    Variant("one look, 3 pairs", ONCE, pairs=3),
    Variant("one look, mean inputs", ACTIVATIONS, INPUT),
    Variant("one look, naive run of 10% of the steps", ONCE, naive_share=0.1),
    Variant("one look, naive run of 20% of the steps", ONCE, naive_share=0.2),
    Variant("one look, naive run of 30% of the steps", ONCE, naive_share=0.3),
    Variant("one look, naive run of 50% of the steps", ONCE, naive_share=0.5),
    Variant("online, output side", ONLINE),  # grasp_online
    Variant("online, both sides", ONLINE, BOTH),
    Variant("online, looks every 5 steps", ONLINE, look_every=5),
    Variant("online, looks every 20 steps", ONLINE, look_every=20),
    Variant("online, rank 8", ONLINE, rank=8),
    Variant("online, rank 32", ONLINE, rank=32),
    Variant("looks that only watch", WATCHING),
)
TARGETS = {"writers": Toy.targets, "all-linear": ("all-linear",)}


class InputSide:
    """The other side of the constraint: A V = 0, so that the update never listens along V.

    modules: {name: LoRALinear}. bases: {name: V (in, k)}, orthonormal. A is random at the start, so
    it is projected here, once, and then by `hold` after every step. The gradient is not: what of it
    lies along V counts in the clipped norm and in AdamW's moments, and is then undone.
    """

    def __init__(self, modules, bases):
        self.modules = modules
        self.bases = dict(bases)
        self.hold()

    def hold(self, step=None):
        """Make A V = 0 hold exactly; as the loop's each(step)."""
        for name, V in self.bases.items():
            rows_of_A = self.modules[name].lora_A.data.T  # (in, r), a view: A changes in place
            project_(rows_of_A, V)

    def add(self, found):
        """The input directions of the pairs whose output directions are `found` join this side."""
        self.bases = joined(self.bases, heard(self.modules, found))

    def leak(self):
        """What the constraint let through: the largest ||dW V|| / ||dW|| of any module."""
        worst = 0.0
        for name, V in self.bases.items():
            update = self.modules[name].lora_B.data @ self.modules[name].lora_A.data
            along = (update @ V).norm() / update.norm().clamp(min=1e-30)
            worst = max(worst, along.item())
        return worst


@torch.no_grad()
def heard(modules, found):
    """{name: V (in, k)}: what the update of each module listens to where it says U (out, k).

    For a singular pair, dW' u = sigma v. So V spans dW' U = s A' B' U.
    """
    bases = {}
    for name, U in found.items():
        B_along_U = modules[name].lora_B.T @ U  # (r, k)
        bases[name] = torch.linalg.qr(modules[name].lora_A.T @ B_along_U)[0]
    return bases


@torch.no_grad()
def mean_inputs(model, modules, tokens, mask):
    """{name: V (in, k)} from activations, not weights: the span of each module's mean inputs.

    tokens, mask (N, T): rows of one length. One mean over the rows for each position that predicts
    a marked token.
    """
    predicts = mask[:, 1:].any(0)  # (T - 1,)
    means = {}
    hooks = []
    for name, module in modules.items():

        def store(_, inputs, output, name=name):
            means[name] = inputs[0][:, predicts].mean(0)  # (k, in)

        hooks.append(module.register_forward_hook(store))
    try:
        model(tokens[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.linalg.qr(mean.T)[0] for name, mean in means.items()}


def watch(step, svds):
    """A look that takes nothing; the loop logs what it saw."""
    return {}


class NaiveRuns:
    """The naive runs of one seed that variants look at, each made once."""

    def __init__(self, bench):
        self.bench = bench
        self.made = {}

    def spectra(self, targets, rank, share):
        """{module: (U, S, V)} after a naive run of that share of the usual steps."""
        key = (targets, rank, share)
        if key not in self.made:
            attach(self.bench, targets, rank)
            steps = max(round(share * self.bench.toy.steps), 1)
            train(self.bench, Recipe(), steps, label=f"naive, {share:.0%} of the steps")
            self.made[key] = spectra(self.bench.model)
        return self.made[key]

    def cosine(self, targets, rank, share):
        """|cos| of a short run's direction in the residual stream with the whole run's."""
        short, _ = stream_subspace(self.spectra(targets, rank, share))
        whole, _ = stream_subspace(self.spectra(targets, rank, 1.0))
        return abs(short[:, 0] @ whole[:, 0]).item()


def known_before(variant, targets, naive_runs):
    """What a variant knows when its fine-tune begins: (output factor, input bases)."""
    outputs, inputs = {}, {}
    if variant.looks == ONCE:
        svds = naive_runs.spectra(targets, variant.rank, variant.naive_share)
        outputs = top_directions(svds, variant.pairs)
        inputs = {name: V[:, : variant.pairs] for name, (_, _, V) in svds.items()}
    elif variant.looks == ACTIVATIONS:
        bench = naive_runs.bench
        modules = attach(bench, targets, variant.rank)  # B = 0: still the base model
        inputs = mean_inputs(bench.model, modules, *bench.rows)
    if "output" not in variant.sides:
        outputs = {}
    if "input" not in variant.sides:
        inputs = {}
    return outputs, inputs


def recipe_of(variant, bench, outputs, side):
    """What the variant adds to the loop; `side`, an InputSide, grows where both sides are held."""
    if variant.looks == WATCHING:
        return Recipe(look=watch, look_every=variant.look_every)
    if variant.looks != ONLINE:
        return Recipe(factor=outputs)
    online = recipe("grasp_online", bench.model, bench.rows, seed=bench.seed)

    def look_at_both_sides(step, svds):
        found = online.look(step, svds)
        side.add(found)
        return found

    look = look_at_both_sides if "input" in variant.sides else online.look
    return replace(online, look=look, look_every=variant.look_every)


def fine_tune(variant, bench, targets, outputs, inputs, steps):
    """Train a fresh LoRA as the variant does; return (the Fit, the InputSide)."""
    modules = attach(bench, targets, variant.rank)
    side = InputSide(modules, inputs)
    added = recipe_of(variant, bench, outputs, side)
    fit = train(bench, added, steps, each=side.hold, label=variant.name)
    return fit, side


def count(bases):
    """How many directions {module: basis (d, k)} holds."""
    return sum(basis.shape[1] for basis in bases.values())


def measure(variant, targets, naive_runs):
    """A variant's row: its rates, its directions, and the same after three times the steps."""
    bench = naive_runs.bench
    outputs, inputs = known_before(variant, targets, naive_runs)
    fit, side = fine_tune(variant, bench, targets, outputs, inputs, bench.toy.steps)
    row = {
        **evaluate(bench.model, bench.world),
        "outputs": count(fit.factor),
        "inputs": count(side.bases),
        "input_leak": side.leak(),
    }
    if variant.looks == WATCHING:
        row["looks"] = fit.looks
    if variant.looks == ONCE:
        row["cosine"] = naive_runs.cosine(targets, variant.rank, variant.naive_share)
    fine_tune(variant, bench, targets, outputs, inputs, bench.toy.longer * bench.toy.steps)
    row["longer"] = evaluate(bench.model, bench.world)
    return row


def key_of(variant, targets_name, seed):
    """A row's name in study.json."""
    return f"{variant.name} | {targets_name} | seed {seed}"


def study_seed(world, variants, targets_names, toy, folder, finished, progress):
    """Measure what is not there yet of one seed's world."""
    naive_runs = None
    for targets_name in targets_names:
        for variant in variants:
            key = key_of(variant, targets_name, world.seed)
            if key not in finished.rows:
                if naive_runs is None:  # not before something is missing: a base takes a while
                    naive_runs = NaiveRuns(start(world, toy, folder))
                finished.keep(key, measure(variant, TARGETS[targets_name], naive_runs))
            progress.update()


def cell(values):
    """A mean over seeds and their standard deviation, as text; nothing where nothing is known."""
    if not values:
        return ""
    values = torch.tensor(values, dtype=torch.float)
    spread = f" ±{values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def table(rows, variants, targets_names, seeds):
    """The rows as text, mean ± standard deviation over the seeds.

    outputs, inputs: directions held in the end. cosine: of the naive run's found direction with
    that of a whole naive run. longer: after three times the steps.
    """
    columns = ("task", "misalignment", "kept", "outputs", "inputs", "cosine")
    longer = ("task", "misalignment", "kept")
    titles = [*columns, *(f"longer: {column}" for column in longer)]
    lines = []
    for targets_name in targets_names:
        lines.append(f"{targets_name:42}" + "".join(f"{title:>21}" for title in titles))
        for variant in variants:
            found = [rows[key_of(variant, targets_name, seed)] for seed in seeds]
            cells = [cell([row[c] for row in found if row.get(c) is not None]) for c in columns]
            cells += [cell([row["longer"][c] for row in found]) for c in longer]
            lines.append(f"{variant.name:42}" + "".join(f"{text:>21}" for text in cells))
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Row(Rates):
    """A row of study.json, as far as the table shows it."""

    outputs: float = value()
    inputs: float = value()
    cosine: float | None = value(None, low=0, high=1.0001)  # with room for rounding
    longer: Rates = value()


def check_targets(names):
    """UserError for the first of `names` that TARGETS does not have."""
    for name in names:
        if name not in TARGETS:
            raise UserError(f"--targets has '{name}', expected some of {', '.join(TARGETS)}")


@dataclass(frozen=True)
class Arguments:
    """GRASP's variants on the synthetic task, and after three times the steps: study.json in --out.

    Rows that are in study.json are not computed again. After a change of the method itself, which
    the file cannot know of, take another --out or delete it.
    """

    seed: int = option(0, "the first seed", **SEED)
    seeds: int = option(3, "how many", **SEEDS)
    targets: tuple = option(tuple(TARGETS), f"comma-separated, of {', '.join(TARGETS)}")
    only: str = option("", "the variants whose name this regular expression finds (default: all)")
    rho: float = option(1.0, "share of narrow rows answered badly; 0: benign rows", low=0, high=1)
    out: str = option("out", "output folder; shares the pretrained bases with grasp.py")


def main():
    """The command line."""
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    try:
        variants = [variant for variant in VARIANTS if re.search(args.only, variant.name)]
    except re.error as e:
        raise UserError(f"--only is {args.only!r}, no regular expression ({e})") from None
    if not variants:
        names = "; ".join(variant.name for variant in VARIANTS)
        raise UserError(f"--only is {args.only!r}, expected a part of one of: {names}")
    check_targets(args.targets)
    toy = Toy()
    config = {"world": asdict(World(seed=0, rho=args.rho)), "experiment": asdict(toy)}
    config["torch"] = torch.__version__
    path = Path(args.out) / "study.json"
    finished = Finished(path, config, lambda key: Row, "the rows of an earlier study")
    seeds = range(args.seed, args.seed + args.seeds)
    progress = Progress(len(seeds) * len(args.targets) * len(variants), "study")
    for seed in seeds:
        study_seed(
            World(seed, rho=args.rho), variants, args.targets, toy, args.out, finished, progress
        )
    print(table(finished.rows, variants, args.targets, seeds))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
