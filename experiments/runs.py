"""What the study and the phase diagram share: fine-tunes of the toy, and rows kept on disk."""

import json
from dataclasses import dataclass
from pathlib import Path

from data.base import pretrain
from grasp import Bench
from lora import add_lora, lora_modules, remove_lora
from support.errors import UserError
from support.files import writable_folder, write_json
from support.schema import from_json, read_file, value
from train import Optimisation, finetune


def start(world, toy, folder):
    """The Bench of a world: its rows, and its base, trained in `folder` or read from there."""
    model = pretrain(world, toy, world.seed, folder)
    return Bench(world, toy, world.seed, model, world.finetuning_rows())


def attach(bench, targets=None, rank=None):
    """Put a fresh LoRA of scaling 1 on the bench's model; return its modules by name.

    The defaults are the toy's. The init is drawn from the bench's seed, so all runs start alike.
    """
    remove_lora(bench.model)
    rank = rank or bench.toy.rank
    add_lora(bench.model, rank, rank, targets or bench.toy.targets, seed=bench.seed)
    return lora_modules(bench.model)


def train(bench, recipe, steps, each=None, label="fine-tune"):
    """Train the LoRA on the bench's model for `steps` of its whole batch; return the Fit."""

    def whole_batch(step):
        return bench.rows

    options = Optimisation(steps=steps, lr=bench.toy.lr)
    return finetune(bench.model, whole_batch, options, recipe, each=each, label=label)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What tables and maps show of a run's measurements."""

    task: float = value(low=0, high=1)
    misalignment: float = value(low=0, high=1)
    kept: float = value(low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class _File:
    """What a file of Finished rows holds."""

    config: dict = value()
    rows: dict = value()


class Finished:
    """Rows in a JSON file, by key: each is written as it comes, and none is computed twice.

    config: what the rows depend on. kind_of(key): what that row is, a type as support/schema has
    them. what: what the file is, for an error. UserError, before any work, where the file cannot be
    written, was made with another config, or holds something else.
    """

    def __init__(self, path, config, kind_of, what):
        self.path = writable_folder(Path(path).parent, [Path(path).name]) / Path(path).name
        self.config = json.loads(json.dumps(config))  # as the file will have it: lists, no tuples
        self.rows = {}
        self.summary = None
        if self.path.exists():
            earlier = read_file(_File, self.path, what)
            if earlier.config != self.config:
                raise UserError(
                    f"{self.path}: was made with other settings; expected the same, another --out, "
                    "or no such file"
                )
            for key, row in earlier.rows.items():
                from_json(kind_of(key), row, self.path, name=f"rows.{key}")
            self.rows = earlier.rows

    def keep(self, key, row):
        """Add a row, and write the file."""
        self.rows[key] = row
        self.write()

    def summarise(self, summary):
        """Write the file once more, with a summary of its rows."""
        self.summary = summary
        self.write()

    def write(self):
        """The file: config, rows, and the summary where there is one."""
        whole = {"config": self.config, "rows": self.rows}
        if self.summary is not None:
            whole["summary"] = self.summary
        write_json(self.path, whole)
