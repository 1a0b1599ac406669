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
from support.schema import from_json, readable, show, value
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

    def restore(self, fit, recipe, modules, optimizer, schedule):
        """Put the saved state back into all of these; return the number of steps already done.

        UserError where the file is no whole checkpoint of this run, by this recipe.
        """
        path = None if self.folder is None else self.folder / "checkpoint.pt"
        if path is None or not self.resume or not lexists(path):
            return 0
        state = load_state(path)
        if state["config"] != self.config:
            keys = sorted({*self.config, *state["config"]}, key=str)
            differ = [k for k in keys if self.config.get(k) != state["config"].get(k)]
            raise UserError(
                f"{path}: was made with other settings ({', '.join(map(readable, differ))}); "
                "expected the same, or another --out"
            )
        parameters = [p for m in modules.values() for p in (m.lora_A, m.lora_B)]
        check_parameters(path, state, parameters)
        check_looks(path, state, recipe, modules)
        check_factor(path, state, recipe, modules)

        for p, data in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(data)
        groups = optimizer.state_dict()["param_groups"]
        moments = {i: clones(moments) for i, moments in enumerate(state["moments"])}
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
    try:
        json.dumps(state["config"])
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: 'config' is not what JSON can hold") from None
    return state


def clones(tensors):
    """The same dictionary of tensors, each with memory of its own, as AdamW writes to them."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def check_tensor(path, name, tensor, shape):
    """UserError unless a tensor has the shape, and holds finite numbers in fp32."""
    if tensor.shape != shape:
        raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UserError(
            f"{path}: {name} is {tensor.layout} on {tensor.device}, expected plain data"
        )
    if tensor.dtype != torch.float32:
        raise UserError(f"{path}: {name} is {tensor.dtype}, expected torch.float32")
    if not tensor.isfinite().all():
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


def check_looks(path, state, recipe, modules):
    """UserError unless the looks are those that a run of so many steps has made."""
    steps = [look["step"] for look in state["looks"]]
    expected = []
    if recipe.look is not None:
        expected = list(range(recipe.look_every, len(state["losses"]) + 1, recipe.look_every))
    if steps != expected:
        raise UserError(f"{path}: looks at steps {show(steps)}, expected {show(expected)}")
    for look in state["looks"]:
        if look["spike"].keys() != modules.keys() or not look["joined"].keys() <= modules.keys():
            raise UserError(f"{path}: the look at step {look['step']} is of other modules")


def check_factor(path, state, recipe, modules):
    """UserError unless the factor is the recipe's, with the directions that joined at the looks."""
    widths = {name: U.shape[1] for name, U in recipe.factor.items()}
    for look in state["looks"]:
        for name, n_directions in look["joined"].items():
            widths[name] = widths.get(name, 0) + n_directions
    factor = state["factor"]
    for name in factor:
        if name not in modules:
            raise UserError(f"{path}: constrains {show(name)}, which has no LoRA")
    if factor.keys() != widths.keys():
        raise UserError(
            f"{path}: constrains {show(sorted(factor))}, expected {show(sorted(widths))}"
        )
    for name, U in factor.items():
        check_tensor(path, f"the factor of {name}", U, (len(modules[name].lora_B), widths[name]))
        check_orthonormal(path, f"the factor of {name}", U)
        given = recipe.factor.get(name)
        if given is not None and given.shape == U.shape and not torch.equal(given.cpu(), U):
            raise UserError(f"{path}: the factor of {name} is not the one that the run was given")
    if recipe.project_B:
        parameters = iter(state["parameters"])
        for name, _A, B in zip(modules, parameters, parameters, strict=True):
            if name in factor and (factor[name].T @ B).norm() > 1e-4 * B.norm() + 1e-30:
                raise UserError(f"{path}: the update of {name} is not off its factor")
