"""What a fine-tune leaves on disk as it runs: its log, and a state to go on from, bit for bit."""

import contextlib
import json
import time
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import torch

from support.errors import UserError
from support.files import named, read_torch, write_torch
from support.processes import RANK
from support.program import deferred_interrupt
from support.schema import from_json, show, value
from support.subspace import check_orthonormal


class Checkpoint:
    """A folder with log.jsonl and checkpoint.pt. Without a folder, nothing is written or restored.

    config: what the state may be resumed under, a dictionary as JSON has it. resume: go on from the
    state in the folder, if there is one.
    """

    def __init__(self, folder=None, config=None, resume=False):
        self.folder = None if folder is None else Path(folder)
        self.config, self.resume = config or {}, resume
        self.log_has_begun = False
        self.began = time.monotonic()

    def deferred_interrupt(self):
        """A context in which Ctrl-C and a kill wait for the end of a step, if there is a folder."""
        if self.folder is None:
            return contextlib.nullcontext([])
        return deferred_interrupt()

    def record(self, step, fit):
        """Add the step that `fit` ended with to the log."""
        if self.folder is None or RANK:
            return
        lines = []
        if not self.log_has_begun:  # a resumed run's log starts with the steps that its state holds
            self.folder.mkdir(parents=True, exist_ok=True)
            for earlier, loss in enumerate(fit.losses[:-1]):
                lines.append(self.line(earlier, loss, fit.looks))
        seconds = round(time.monotonic() - self.began, 3)
        lines.append({**self.line(step, fit.losses[-1], fit.looks[-1:]), "seconds": seconds})
        path = self.folder / "log.jsonl"
        with named(path), open(path, "a" if self.log_has_begun else "w") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
        self.log_has_begun = True

    def line(self, step, loss, looks):
        """What the log says of a step: its loss, and what joined the factor where it looked."""
        line = {"step": step, "loss": loss}
        for look in looks:
            if look["step"] == step + 1:
                line["joined"] = look["joined"]
        return line

    def save(self, fit, parameters, optimizer):
        """Keep all that the next step depends on; the learning rate hangs on the step alone."""
        if self.folder is None or RANK:
            return
        state = {
            "config": self.config,
            "losses": fit.losses,
            "looks": fit.looks,
            "factor": fit.factor,
            "parameters": [p.data for p in parameters],
            "moments": [optimizer.state[p] for p in parameters if p in optimizer.state],
        }
        write_torch(self.folder / "checkpoint.pt", state)

    def restore(self, fit, modules, optimizer, schedule):
        """Put the saved state back into all of these; return the number of steps already done.

        UserError where the file is no whole checkpoint of this run.
        """
        path = None if self.folder is None else self.folder / "checkpoint.pt"
        if path is None or not self.resume or not lexists(path):
            return 0
        state = load_state(path)
        if state["config"] != self.config:
            keys = sorted({*self.config, *state["config"]}, key=str)
            differ = [k for k in keys if self.config.get(k) != state["config"].get(k)]
            raise UserError(
                f"{path}: was made with other settings ({', '.join(map(str, differ))}); "
                "expected the same, or another --out"
            )
        parameters = [p for m in modules.values() for p in (m.lora_A, m.lora_B)]
        check_parameters(path, state, parameters)
        check_factor(path, state["factor"], modules)

        for p, data in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(data)
        groups = optimizer.state_dict()["param_groups"]
        moments = dict(enumerate(state["moments"]))
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        n_steps = len(state["losses"])
        schedule.last_epoch = n_steps
        for group, peak, share_of_peak in zip(
            optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * share_of_peak(n_steps)
        device = parameters[0].device
        fit.losses, fit.looks = state["losses"], state["looks"]
        fit.factor = {name: U.to(device) for name, U in state["factor"].items()}
        return n_steps


@dataclass(frozen=True, kw_only=True)
class _Look:
    step: int = value(low=1)
    spike: dict[str, float] = value()
    joined: dict[str, int] = value(low=1)


@dataclass(frozen=True, kw_only=True)
class _State:
    """A checkpoint's parts."""

    config: dict = value()
    losses: list[float] = value()
    looks: list[_Look] = value()
    factor: dict[str, torch.Tensor] = value()
    parameters: list[torch.Tensor] = value()
    moments: list[dict[str, torch.Tensor]] = value()


def load_state(path):
    """The dictionary in a checkpoint file, each part of the right type; UserError if it is not."""
    state = read_torch(path, "a whole checkpoint")
    from_json(_State, state, path)
    return state


def check_tensor(path, name, tensor, shape):
    """UserError unless a tensor has the shape, holds floating-point numbers, and all finite."""
    if tensor.shape != shape:
        raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise UserError(f"{path}: {name} has values that are not finite numbers")


def check_parameters(path, state, parameters):
    """UserError unless the state has each parameter, and its moments at this step."""
    n_steps = len(state["losses"])
    expected = {"parameters": len(parameters), "moments": len(parameters) if n_steps else 0}
    for part, n in expected.items():
        if len(state[part]) != n:
            raise UserError(f"{path}: {len(state[part])} {part} at step {n_steps}, expected {n}")
    for i, (p, data) in enumerate(zip(parameters, state["parameters"], strict=True)):
        check_tensor(path, f"parameter {i}", data, p.shape)
    for i, moments in enumerate(state["moments"]):
        if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(f"{path}: the moments of parameter {i} are not those of AdamW")
        for name in ("exp_avg", "exp_avg_sq"):
            check_tensor(path, f"{name} of parameter {i}", moments[name], parameters[i].shape)
        check_tensor(path, f"the step of parameter {i}", moments["step"], ())
        if moments["step"] != n_steps or moments["exp_avg_sq"].min() < 0:
            raise UserError(f"{path}: the moments of parameter {i} are not those of step {n_steps}")


def check_factor(path, factor, modules):
    """UserError unless each basis is one of a module's outputs."""
    for name, U in factor.items():
        if name not in modules:
            raise UserError(f"{path}: constrains {show(name)}, which has no LoRA")
        n_directions = U.shape[-1] if U.dim() else 0
        check_tensor(path, f"the factor of {name}", U, (len(modules[name].lora_B), n_directions))
        check_orthonormal(path, f"the factor of {name}", U)
