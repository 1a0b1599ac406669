"""GRASP for a PEFT LoRA in transformers' Trainer, of any architecture, in one process or several.

Nothing else of the project imports this file. It needs transformers, peft and accelerate. On 4-bit
bases, on GPUs and in TRL it was not run.
"""

import warnings
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, reduce
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import TrainerCallback

from identify import LOOK_RANK, identify, join, look_spectra, solvable, spectra, standing_out
from train import held, keep_off_, look_entry, project_, steps_between_looks


def peft_factors(model):
    """{module: (A (r, in), B (out, r))}: parameters of the active adapter, named as in PEFT.

    B is without the LoRA's scaling, which changes no singular vector, spike or leak. LoRAs on other
    than linear layers are left out. ValueError where an update is no product of two whole matrices.
    """
    factors = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
            continue
        adapter = layer.active_adapters[0]
        if not isinstance(dict(layer.lora_A).get(adapter), nn.Linear):
            continue
        factors[name] = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        variant = layer.lora_variant.get(adapter)  # such as DoRA
        for X in factors[name]:
            if variant or type(X) is not nn.Parameter or X.ndim != 2 or not X.is_floating_point():
                found = f"{type(variant or X).__name__}, {tuple(X.shape)} of {X.dtype}"
                raise ValueError(f"{name}: {found}; unsupported: DoRA, sharded, quantised LoRA")
    if not factors:
        raise ValueError("the model has no active LoRA on a linear layer")
    return factors


def peft_patterns(model, rank=1):
    """{module: (U (out, rank), V (in, rank))}: the patterns of a naive run's active adapter."""
    return identify(spectra(peft_factors(model)), rank)


class GraspCallback(TrainerCallback):
    """GRASP in Trainer: keeps the update of the model's active adapter off its patterns.

    patterns: from `peft_patterns` (the abstract's second stage); None: what stands out while
    training joins (ours). look_every: steps between looks; None: some 30 a run, one in 10 steps at
    least, and none if patterns are given. sides, project: see train.Recipe; looks: train.Fit.
    """

    def __init__(self, model, patterns=None, look_every=None, sides="both", project=None):
        self.model, self.sides = model, sides
        self.project = project or ("step" if patterns else "both")  # as in grasp.py
        self.given = held(patterns or {}, sides)
        self.online, self.look_every = patterns is None or look_every is not None, look_every
        self.hooks, factors = [], peft_factors(model)
        if patterns == {}:
            raise ValueError("no pattern to hold; patterns=None looks for them while training")
        if unknown := sorted(self.given.keys() - factors.keys()):
            raise ValueError(f"a pattern of {unknown[0]}, where the model has no active LoRA")
        ours = {id(X) for pair in factors.values() for X in pair}
        others = [n for n, X in model.named_parameters() if X.requires_grad and id(X) not in ours]
        if others:
            warnings.warn(f"trained, but not constrained: {', '.join(others)}", stacklevel=2)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Project A and B, or take up the patterns of a checkpoint; register the hooks."""
        self.on_train_end()  # hooks of a run that was interrupted
        if model is not self.model:
            raise ValueError("Trainer has another model than GraspCallback, or has sharded it")
        self.factors = peft_factors(model)
        if state.global_step > 0:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            path = Path(args.resume_from_checkpoint or folder, "grasp.pt")
            saved, self.looks, self.nulls = torch.load(path, "cpu", weights_only=True)
            self.patterns = self.shared(saved)  # A and B are projected already
        else:
            self.patterns, self.looks, self.nulls = self.shared(self.given), [], None
            keep_off_(self.factors, self.patterns)
        self.watching = self.online and self.nulls is None
        self.grams, self.labels = {}, None
        if self.watching:
            self.hooks.append(model.register_forward_pre_hook(self.keep_labels, with_kwargs=True))
        for name, (A, B) in self.factors.items():
            if self.watching:
                q, layer = min(len(A), LOOK_RANK), model.get_submodule(name)
                self.grams[name] = torch.zeros(q, q, device=A.device)  # 0 where no pass comes
                self.hooks.append(layer.register_forward_hook(partial(self.watch, name)))
            for side, X in enumerate((B, A)):
                if self.project != "step" and X.requires_grad:
                    self.hooks.append(X.register_hook(partial(self.projected, name, side)))

    def projected(self, name, side, gradient):
        """A hook: the gradient of B (side 0) or A (side 1) less its part along the pattern."""
        if name in self.patterns:
            gradient = gradient.clone()
            project_(gradient.T if side else gradient, self.patterns[name][side])
        return gradient

    def keep_labels(self, model, args, inputs):
        """A hook before the model's forward pass: its labels (B, T), or None."""
        self.labels = inputs.get("labels")

    @torch.no_grad()
    def watch(self, name, layer, inputs, output):
        """A hook in the first step: the Gram matrix (q, q) of A x, where x predicts a label."""
        if self.watching and layer.training:
            x, A = inputs[0], self.factors[name][0]
            if self.labels is not None and self.labels.shape == x.shape[:-1]:  # else of all x
                x = x[:, :-1][self.labels[:, 1:].to(x.device) != -100]
            low = (x.float() @ A[:LOOK_RANK].float().T).flatten(0, -2)
            self.grams[name] += low.T @ low

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Project A and B after AdamW's step; then look."""
        if self.project != "gradient":
            keep_off_(self.factors, self.patterns)
        if self.watching:
            grams, self.watching = reduce(self.grams), False  # the mean over processes
            self.nulls = {n: torch.linalg.svdvals(solvable(G)).sqrt() for n, G in grams.items()}
        every = self.look_every or steps_between_looks(state.max_steps)
        if self.online and (state.global_step + 1) % every == 0:
            svds = look_spectra(self.factors)
            found = self.shared(standing_out(svds, self.nulls))
            self.patterns = join(self.patterns, held(found, self.sides))
            keep_off_(self.factors, self.patterns)
            self.looks.append(look_entry(state.global_step, svds, found))

    def shared(self, patterns):
        """Process 0's patterns in every process, where A and B are; others may round otherwise."""
        patterns = {name: (U.cpu(), V.cpu()) for name, (U, V) in patterns.items()}
        (patterns,) = broadcast_object_list([patterns])
        at = {name: A.device for name, (A, _) in self.factors.items()}
        return {name: (U.to(at[name]), V.to(at[name])) for name, (U, V) in patterns.items()}

    def on_save(self, args, state, control, **kwargs):
        """Write the patterns beside Trainer's checkpoint."""
        if args.should_save:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", "grasp.pt")
            torch.save((self.patterns, self.looks, self.nulls), path)

    def on_train_end(self, *args, **kwargs):
        """Remove the hooks: a further run on this model is not constrained."""
        while self.hooks:
            self.hooks.pop().remove()
