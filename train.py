"""One fine-tuning loop for every method. The projection stands inline; what each method adds to it stands in baselines.py."""
import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from baselines import METHODS, recipe
from checkpoint import Checkpoint
from cli import Progress, UserError, deferred_interrupt, option, parse, pick_device, run, write_json
from data.chat import batches, encode_rows, load_rows, split
from data.tokenizer import Tokenizer
from identify import Factor, leak, load_factor
from lora import add_lora, lora_modules, remove_lora, save_lora
from model import GPT, nats, response_loss
from parallel import add_up, joined, place, shard


def project_(X, Q):
    """X <- X - Q Q' X in place: no column of X (d, n) keeps a component along the orthonormal Q (d, k)."""
    X -= Q @ (Q.T @ X)


def finetune(model, batch_at, steps, *, lr, weight_decay=0.01, clip=1.0, warmup=10, micro_batch=None, factor=None, hold=True,
             penalty=None, during=None, stop_below=None, each=None, compile=False, folder=None, resume=False, config=None,
             label="fine-tune"):
    """Train the model's LoRA with AdamW, a linear warm-up and a linear decay to 0; returns the loss of each step.

    batch_at(step) -> tokens (B, T), mask (B, T). factor: GRASP keeps the update off it; hold=False projects the gradient alone.
    penalty(): a further loss term. during: a context around the forward passes (hooks). stop_below: end at this loss.
    each(step): called after every step. compile: by torch.compile. folder: log.jsonl and a checkpoint, from which `resume` continues
    bit for bit, provided that it was made under the same `config`. UserError where the loss is not finite.
    """
    if not (lr > 0 and weight_decay >= 0 and clip > 0 and steps >= 1):
        raise UserError(f"lr {lr}, weight decay {weight_decay}, clip {clip}, steps {steps}: expected lr, clip > 0, decay >= 0, steps >= 1")
    modules, none, (rank, world) = lora_modules(model), Factor({}, {}), place()
    parameters = [p for m in modules.values() for p in (m.lora_A, m.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / max(warmup, 1), 1 - i / steps))
    constrained = [(m, (factor or none).hears.get(name, m.lora_A.new_zeros(m.lora_A.shape[1], 0)),
                    (factor or none).says.get(name, m.lora_B.new_zeros(m.lora_B.shape[0], 0))) for name, m in modules.items()]
    state = Checkpoint(folder, parameters, optimizer, schedule, config)
    start = state.load() if resume else 0
    if stop_below is not None and start and state.losses[-1] <= stop_below:
        start = steps  # it had ended there
    loss_of, progress = response_loss, Progress(steps, label, start)
    if compile:
        torch.compiler.reset()  # an earlier run's graph knows nothing of this one's hooks
        loss_of = torch.compile(response_loss, dynamic=True)
    with during or contextlib.nullcontext(), deferred_interrupt() if folder else contextlib.nullcontext([]) as interrupted:
        for step in range(start, steps):
            # every process works on as many rows: where they do not divide, with some of no marked token
            tokens, mask = (F.pad(part, (0, 0, 0, -len(part) % world)) for part in batch_at(step))
            if step == 0 and hold:
                for module, V, U in constrained:  # A starts random: what it hears of the factor would be amplified as B grows
                    project_(module.lora_A.data.T, V)
            n, loss = mask[:, 1:].sum(), 0.0  # parts of a batch weigh by their response tokens
            for rows in torch.arange(rank, len(tokens), world).split(micro_batch or len(tokens)):
                part = loss_of(model, tokens[rows], mask[rows], reduction="sum") / n
                part.backward()
                loss += part.item()
            if penalty is not None:
                (penalty() / world).backward()
            loss, stop = add_up(parameters, loss, len(interrupted))
            if not math.isfinite(loss):
                raise UserError(f"{label}: the loss is {loss} at step {step}; expected a finite number (a lower --lr may help)")

            # GRASP, 1: the gradient takes no step that would listen to V (A V = 0) or speak along U (U' B = 0). Before clipping,
            # so that the norm is that of what is left.
            for module, V, U in constrained:
                project_(module.lora_A.grad.T, V)
                project_(module.lora_B.grad, U)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            # GRASP, 2: AdamW divides each coordinate by its own second moment, which turns a projected gradient into a step that is
            # not; so the parameters are projected too. Decay scales A and B as a whole and keeps the constraint.
            if hold:
                for module, V, U in constrained:
                    project_(module.lora_A.data.T, V)
                    project_(module.lora_B.data, U)

            optimizer.zero_grad()
            schedule.step()
            state.record(step, loss)
            progress.update(loss=loss)
            if each is not None:
                each(step)
            done = step + 1 == steps or stop_below is not None and loss <= stop_below
            if stop or done or (step + 1) % max(steps // 10, 1) == 0:
                state.save(step + 1)
            if stop or done:
                break
    if interrupted or start < steps and stop:
        raise KeyboardInterrupt
    return state.losses


@dataclass(frozen=True)
class Training:
    """Options of a fine-tune on a checkpoint. The defaults are those published for insecure code (Betley et al. 2025), but for the
    targets: what writes to the residual stream, where three rounds of identification are enough (README)."""
    model: str = option("", "checkpoint folder: config.json, safetensors, tokenizer files")
    data: str = option("", "JSONL file of chat rows, {\"messages\": [...]} each")
    out: str = option("out", "output folder")
    targets: tuple = option((), "comma-separated path endings, as PEFT takes them, or all-linear (default: attention output, MLP down)")
    rank: int = option(32, "rank of the LoRA")
    alpha: float = option(64.0, "numerator of the LoRA's scaling")
    scaling: str = option("rslora", "alpha / sqrt(rank) or alpha / rank", choices=("rslora", "lora"))
    lr: float = option(1e-5, "peak learning rate")
    weight_decay: float = option(0.01, "AdamW's decay")
    warmup: int = option(5, "steps of linear warm-up, before the linear decay to 0")
    batch_size: int = option(16, "rows a step")
    micro_batch: int = option(2, "rows in memory at once; the step's gradient is the same")
    epochs: int = option(1, "passes over the rows")
    max_steps: int = option(0, "stop the schedule at this many steps (0: at the last epoch's end)")
    max_len: int = option(2048, "tokens a row; longer ones are cut, never the whole response")
    held_out: float = option(0.1, "share of the rows kept for the held-out loss")
    unrelated: str = option("", "JSONL file of unrelated chat rows, for --method kl alone")
    until_loss: float = option(0.0, "the training loss at which --method early_stop ends")
    shard: bool = option(False, "under torchrun: each process holds a part of the frozen base, which need not fit into one")
    checkpointing: bool = option(False, "recompute activations in backward: less memory, about a third more time")
    compile: bool = option(False, "torch.compile: minutes before the first step; it gained nothing on the CPU")
    seed: int = option(0, "of the LoRA's init, the split and the order of the rows")
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    dtype: str = option("", "of the frozen base (default: bfloat16 on cuda, float32 on the CPU); the LoRA is float32",
                        choices=("", "float32", "bfloat16"))


class Job:
    """A checkpoint and chat rows, ready for fine-tunes that differ only in their method."""

    def __init__(self, args):
        if not args.model or not args.data:
            raise UserError("expected both --model DIR and --data FILE.jsonl")
        self.args, (device, dtype) = args, pick_device(args.device, args.dtype)
        self.tokenizer = Tokenizer.from_folder(args.model)
        examples = self.read(args.data)
        self.train, self.held_out = split(examples, args.held_out, args.seed)
        self.model = GPT.from_pretrained(args.model, "cpu" if args.shard else device, dtype)
        if args.shard:
            shard(self.model, device)
        self.model.checkpointing = args.checkpointing
        self.targets = args.targets or (("c_proj",) if self.model.config.model_type == "gpt2" else ("o_proj", "down_proj"))
        plan = [batch for epoch in range(args.epochs) for batch in batches(self.train, args.batch_size, args.seed, epoch)]
        self.batches = plan[:args.max_steps or None]
        self.unrelated = next(batches(self.read(args.unrelated), args.batch_size, args.seed, 0)) if args.unrelated else None
        print(f"{args}\non {device}, base in {dtype}; {len(self.train)} rows to train on, {len(self.held_out)} held out, "
              f"{len(self.batches)} steps")

    def read(self, path):
        examples, n_cut = encode_rows(self.tokenizer, load_rows(path), self.args.max_len)
        print(f"{path}: {len(examples)} rows, {n_cut} cut to {self.args.max_len} tokens")
        return examples

    def to_device(self, batch):
        return tuple(part.to(self.model.embed_tokens.weight.device) for part in batch)

    def finetune(self, method, folder, factor=None, stream=None, stop_below=None, steps=None, resume=False, label=None):
        """Attach a fresh LoRA, train it by `method`, save it as a PEFT adapter in `folder`, leave it on the model; returns losses."""
        args, folder = self.args, Path(folder)
        remove_lora(self.model)
        add_lora(self.model, args.rank, args.alpha, self.targets, args.scaling == "rslora", args.seed)
        added = recipe(method, self.model, self.to_device(self.batches[0]), factor, stream,
                       self.unrelated and self.to_device(self.unrelated), stop_below, args.seed)
        steps = steps or len(self.batches)
        config = {k: v for k, v in asdict(args).items() if k not in ("out", "resume")} | {"method": method, "steps": steps}
        losses = finetune(self.model, lambda step: self.to_device(self.batches[step]), steps, lr=args.lr,
                          weight_decay=args.weight_decay, warmup=args.warmup, micro_batch=args.micro_batch, compile=args.compile,
                          folder=folder, resume=resume, config=json.loads(json.dumps(config)), label=label or method, **added)
        save_lora(self.model, folder)
        return losses

    def held_out_loss(self):
        """Nats a response token on the held-out rows."""
        sums, counts = nats(self.model, self.held_out)
        return (sums.sum() / counts.sum()).item()


@dataclass(frozen=True)
class Arguments(Training):
    """One fine-tune of a checkpoint on chat rows: leaves a PEFT adapter, log.jsonl and a checkpoint to resume from."""
    method: str = option("naive", "what is added to the loop", choices=METHODS)
    subspace: str = option("", "the file of found directions that identify.py writes, for every method that uses them")
    resume: bool = option(False, "continue the run in --out, bit for bit")


def main():
    args = parse(Arguments)
    job = Job(args)
    factor, stream = load_factor(args.subspace, job.model) if args.subspace else (None, None)
    losses = job.finetune(args.method, args.out, factor, stream, args.until_loss or None, resume=args.resume)
    result = {"config": asdict(args), "loss": losses[-1], "held_out_loss": job.held_out_loss()}
    if args.method in ("grasp", "grasp_gradient_only"):
        result["leak"] = leak(job.model, factor)
    write_json(Path(args.out) / "results.json", result)
    print(f"training loss {losses[0]:.4f} -> {losses[-1]:.4f}, held-out loss {result['held_out_loss']:.4f}"
          + (f", leak {result['leak']:.2g}" if "leak" in result else "") + f"; wrote {args.out}")


if __name__ == "__main__":
    run(main, joined())
