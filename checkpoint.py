"""What a fine-tune leaves on disk while it runs: its log, and a state to go on from, bit for bit."""
import json
import time
from pathlib import Path

import torch

from cli import RANK, UserError, write_torch


class Checkpoint:
    """What a fine-tune needs to go on: LoRA, optimiser, schedule, losses. Without a folder it only keeps the losses."""

    def __init__(self, folder, parameters, optimizer, schedule, config):
        self.folder, self.parameters, self.parts, self.config = folder and Path(folder), parameters, (optimizer, schedule), config
        self.losses, self.began, self.log = [], time.monotonic(), None

    def record(self, step, loss):
        self.losses.append(loss)
        if self.folder and not RANK:
            if self.log is None:  # a resumed run's log starts with the steps that its checkpoint holds
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log = open(self.folder / "log.jsonl", "w")
                for i, value in enumerate(self.losses[:-1]):
                    self.log.write(json.dumps({"step": i, "loss": value}) + "\n")
            self.log.write(json.dumps({"step": step, "loss": loss, "seconds": round(time.monotonic() - self.began, 3)}) + "\n")
            self.log.flush()

    def save(self, step):
        if self.folder and not RANK:
            write_torch(self.folder / "checkpoint.pt", {
                "step": step, "losses": self.losses, "config": self.config, "parameters": [p.data for p in self.parameters],
                "parts": [part.state_dict() for part in self.parts]})

    def load(self):
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return 0
        saved = torch.load(path, map_location=self.parameters[0].device, weights_only=True)
        if saved["config"] != self.config:
            differ = sorted(k for k in self.config if self.config[k] != saved["config"].get(k))
            raise UserError(f"{path}: was made with other settings ({', '.join(differ)}); expected the same, or another --out")
        for p, data in zip(self.parameters, saved["parameters"]):
            p.data.copy_(data)
        for part, data in zip(self.parts, saved["parts"]):
            part.load_state_dict(data)
        self.losses = saved["losses"]
        return saved["step"]
