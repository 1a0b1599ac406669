"""What settled the formulation: which sides, how many rounds, pooled or not, which modules, and how short the naive run may be."""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cli import option, parse, run, write_json
from data.synthetic import World
from eval import evaluate
from grasp import Toy, pretrain
from identify import WRITERS, Factor, in_rounds, spectra, stream_subspace, top_pairs
from lora import add_lora, remove_lora
from train import finetune

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arguments:
    """Misalignment and kept persona of GRASP's variants on the synthetic task, mean over seeds, and after three times the steps."""
    seed: int = option(0, "the first seed")
    seeds: int = option(3, "how many")
    out: str = option("out", "output folder; shares the pretrained bases with grasp.py")


class Bench:
    """A world, its base, and fine-tunes on it."""

    def __init__(self, world, folder):
        self.world, self.toy, self.rows = world, Toy(), world.finetuning_rows()
        self.model = pretrain(replace(world, rho=1.0), self.toy, world.seed, folder)  # pretraining does not depend on rho

    def train(self, factor=None, steps=None, targets=None):
        remove_lora(self.model)
        add_lora(self.model, self.toy.rank, self.toy.rank, targets or self.toy.targets, seed=self.world.seed)
        finetune(self.model, lambda step: self.rows, steps or self.toy.steps, lr=self.toy.lr, factor=factor, label="fine-tune")
        return spectra(self.model)

    def find(self, rounds, sides="both", rank=1, pooled=False, share=None, targets=None):
        """The factor after `rounds`; with a share, every round, the naive one too, takes that share of the steps."""
        def pick(svds):
            pairs, residual = top_pairs(svds, rank), {n: n.endswith(WRITERS) for n in svds}
            says = {n: stream_subspace(svds, rank)[0] for n in svds} if pooled else pairs.says
            return Factor({n: V for n, V in pairs.hears.items() if sides in ("both", "hears") or sides == "residual" and not residual[n]},
                          {n: U for n, U in says.items() if sides in ("both", "says") or sides == "residual" and residual[n]})
        length = lambda steps: steps if share is None else round(share * self.toy.steps)
        return in_rounds(lambda i, factor, steps: self.train(factor, length(steps), targets), rounds, self.toy.steps, pick)[0]

    def measure(self, factor, targets=None):
        row = {}
        for prefix, times in (("", 1), ("long_", self.toy.longer)):
            self.train(factor, times * self.toy.steps, targets)
            measured = evaluate(self.model, self.world)
            row |= {prefix + key: measured[key] for key in ("task", "misalignment", "kept")}
        return row


VARIANTS = {"naive": None, "naive, all seven projections": {"rounds": 0, "targets": ALL},
            **{f"{sides}, {n} round{'s' * (n > 1)}": {"rounds": n, "sides": sides}
               for sides in ("says", "hears", "both") for n in (1, 2, 3)},
            "both, 3 pairs from one round": {"rounds": 1, "rank": 3},
            "both, says pooled over modules, 3 rounds": {"rounds": 3, "pooled": True},
            **{f"both, {n} rounds, all seven projections": {"rounds": n, "targets": ALL} for n in (3, 6, 10)},
            "residual side, 3 rounds, all seven projections": {"rounds": 3, "sides": "residual", "targets": ALL},
            **{f"both, 3 rounds of {share:.0%} of the steps": {"rounds": 3, "share": share} for share in (0.1, 0.2, 0.3, 0.5, 1.0)}}


def main():
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    results = {name: [] for name in VARIANTS}
    for seed in range(args.seed, args.seed + args.seeds):
        bench = Bench(World(seed), args.out)
        full = stream_subspace(bench.train())[0][:, 0]
        for name, variant in VARIANTS.items():
            targets = (variant or {}).get("targets")
            row = bench.measure(bench.find(**variant) if variant and variant["rounds"] else None, targets)
            if variant and "share" in variant:  # how near a short naive run comes to the whole run's direction
                short = bench.train(steps=round(variant["share"] * bench.toy.steps))
                row["cosine"] = abs(stream_subspace(short)[0][:, 0] @ full).item()
            results[name].append(row)
            write_json(Path(args.out) / "study.json", results)
    print(f"{'':50}{'task':>7}{'misal.':>8}{'kept':>7}   3x the steps: {'misal.':>7}{'kept':>7}{'cosine':>8}")
    for name, rows in results.items():
        mean = lambda key: f"{torch.tensor([row[key] for row in rows]).mean():.3f}" if key in rows[0] else ""
        print(f"{name:50}{mean('task'):>7}{mean('misalignment'):>8}{mean('kept'):>7}{'':17}{mean('long_misalignment'):>7}"
              f"{mean('long_kept'):>7}{mean('cosine'):>8}")


if __name__ == "__main__":
    run(main)
