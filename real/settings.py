"""The options of a fine-tune on a checkpoint."""

from dataclasses import dataclass

from support.options import option

SEEDS = {"low": 1, "high": 1000}  # how many
SEED = {"low": 0, "high": 2**62}  # what torch's generators take, with room for derived seeds


@dataclass(frozen=True)
class Training:
    """Options of a fine-tune on a checkpoint.

    The defaults are those published for insecure code (Betley et al. 2025).
    """

    model: str = option("", "checkpoint folder: config.json, safetensors, tokenizer files")
    data: str = option("", 'JSONL file of chat rows, {"messages": [...]} each')
    out: str = option("out", "output folder")
    targets: tuple = option(
        (),
        "comma-separated path endings, as PEFT takes them (default: all-linear, every projection)",
    )
    rank: int = option(32, "rank of the LoRA", low=1)
    alpha: float = option(64.0, "numerator of the LoRA's scaling", above=0)
    scaling: str = option(
        "rslora", "alpha / sqrt(rank) or alpha / rank", choices=("rslora", "lora")
    )
    lr: float = option(
        1e-5, "learning rate: the warm-up ends and the decay begins at it", above=0, high=1e6
    )
    weight_decay: float = option(0.01, "AdamW's decay", low=0)
    warmup: int = option(5, "steps of linear warm-up, before the linear decay to 0", low=0)
    batch_size: int = option(16, "rows a step", low=1)
    micro_batch: int = option(2, "rows in memory at once; the step's gradient is the same", low=1)
    epochs: int = option(1, "passes over the rows", low=1, high=10_000)
    max_steps: int = option(0, "end the schedule at this many steps (0: after the epochs)", low=0)
    max_len: int = option(
        2048, "tokens a row; longer ones are cut, never the whole response", low=4
    )
    held_out: float = option(0.1, "share of rows kept for the held-out loss", above=0, high=0.9)
    look_every: int = option(10, "steps between grasp_online's looks", low=1)
    unrelated: str = option(
        "",
        "JSONL file of unrelated chat rows, for --method kl alone: --batch-size of them, drawn by "
        "the seed, are in the penalty of every step",
    )
    shard: bool = option(
        False,
        "train.py or grasp.py under torchrun: each process holds a part of the frozen base, which "
        "need not fit",
    )
    checkpointing: bool = option(
        False, "recompute activations in backward: less memory, about a third more time"
    )
    seed: int = option(0, "of the LoRA's init, the split and the order of the rows", **SEED)
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    dtype: str = option(
        "",
        "of the frozen base (default: bfloat16 on cuda, float32 on the CPU); the LoRA is float32",
        choices=("", "float32", "bfloat16"),
    )
