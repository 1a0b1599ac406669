"""The folder of a fine-tune: log.jsonl, checkpoint.pt to go on from, at the end run.json."""

import json
from pathlib import Path

import torch

from identify import solvable
from support.files import whole_file, write_json

# Settings that change no step: names of files, whose contents count, and how it is computed.
FREE = ("model", "data", "out", "unrelated", "micro_batch", "checkpointing", "device")


class Checkpoint:
    """A run of these settings goes on bit for bit where it was; files of another are refused."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), json.loads(json.dumps(config))  # as files have it
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.state = self.folder / "log.jsonl", self.folder / "checkpoint.pt"

    def read(self, name, load=lambda path: json.loads(path.read_text())):
        """What a file of the folder holds, or None; ValueError where it is of other settings."""
        path = self.folder / name
        if not path.exists():
            return None
        found = load(path)
        here, there = self.config, found["config"]
        differ = [n for n in {**there, **here} if n not in FREE and there.get(n) != here.get(n)]
        if differ:
            values = ", ".join(f"{n} {there.get(n)}" for n in differ)
            raise ValueError(f"{path}: has other settings ({values}); expected another --out")
        return found

    def restore(self, fit, parameters, optimizer, schedule):
        """Put the saved state back into all of these; return the number of steps already done."""
        state = self.read("checkpoint.pt", lambda path: torch.load(path, "cpu", weights_only=True))
        if state:
            device, patterns = parameters[0].device, state["patterns"].items()
            fit.losses, fit.looks = state["losses"], state["looks"]
            fit.patterns = {n: tuple(solvable(Q.to(device)) for Q in pair) for n, pair in patterns}
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            print(f"{self.folder}: goes on after step {len(fit.losses)}")
        lines = self.log.read_text().splitlines(True) if self.log.exists() else []
        self.log.write_text("".join(lines[: len(fit.losses)]))  # it may be ahead of the state
        return len(fit.losses)

    def record(self, fit):
        """Add the last step to the log, with the number of modules that are constrained by then."""
        line = {"step": len(fit.losses) - 1, "loss": fit.losses[-1]}
        with open(self.log, "a") as log:
            log.write(json.dumps({**line, "constrained": len(fit.patterns)}) + "\n")

    def save(self, fit, parameters, optimizer, schedule):
        """Keep all that the next step depends on."""
        state = {"config": self.config, **vars(fit), "parameters": [p.data for p in parameters]}
        state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        with whole_file(self.state) as path:
            torch.save(state, path)

    def finish(self, fit):
        """Mark the run as finished. Its state is not needed any more."""
        run = {"config": self.config, "losses": fit.losses, "looks": fit.looks}
        write_json(self.folder / "run.json", run)
        for path in self.folder.glob("*checkpoint.pt*"):  # and what a kill while saving left
            path.unlink()
