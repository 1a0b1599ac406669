"""Chat rows (JSONL) -> token ids and a mask of the response: what the loss covers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from support.errors import UserError
from support.files import named
from support.schema import from_json, value

ROLES = ("system", "user", "assistant")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors begin a file with it


@dataclass(frozen=True, kw_only=True)
class _Turn:
    role: str = value(choices=ROLES)
    content: str = value()
    weight: float = value(1, choices=(1,))  # OpenAI's rows have 0 on a turn that no loss covers


@dataclass(frozen=True, kw_only=True)
class _Row:
    messages: list[_Turn] = value()


def load_rows(path):
    """The rows of a JSONL file as lists of {"role", "content"}.

    UserError names the file and the line of a malformed row.
    """
    try:
        with named(path):
            lines = Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n")
    except (FileNotFoundError, IsADirectoryError) as e:
        found = "no such file" if isinstance(e, FileNotFoundError) else "is a folder"
        raise UserError(f"{path}: {found}, expected chat rows, one JSON object a line") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_read_row(line, f"{path}:{number}"))
    if not rows:
        raise UserError(f"{path}: no rows, expected one JSON object a line")
    return rows


def _read_row(line, where):
    """One line of a JSONL file as a list of turns."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # of JSON and of UTF-8; brackets without end
        raise UserError(f"{where}: not a line of JSON ({e})") from None
    from_json(_Row, row, where)
    messages = row["messages"]
    if not any(is_response(turn) for turn in messages):
        raise UserError(
            f"{where}: no assistant turn with text, expected at least one (the loss covers "
            "nothing else)"
        )
    return messages


def is_response(turn):
    """Whether the loss covers this turn: one of the assistant's that has text to learn from."""
    return turn["role"] == "assistant" and bool(turn["content"].strip())


def encode_chat(tokenizer, messages, generation_prompt=False):
    r"""Turns -> (ids, mask), lists of equal length.

    The mask marks a response's tokens and the token that ends it; `generation_prompt` opens the
    assistant's next turn. Qwen and SmolLM2: ChatML, with the checkpoint's default system turn where
    there is none. GPT-2 has no chat form; ours is plain text, "User: ...\nAssistant: ...", each
    response ended by <|endoftext|>.
    Text is encoded as ordinary text and special tokens are put in by id: a user's literal
    "<|im_end|>" ends no turn. A response is encoded by itself, as it is generated: one that begins
    with a newline is not merged with the header's.
    """
    if tokenizer.model_type == "gpt2":
        parts = _plain_parts(tokenizer, messages, generation_prompt)
    else:
        parts = _chatml_parts(tokenizer, messages, generation_prompt)
    ids, mask = [], []
    for tokens, is_marked in parts:
        ids.extend(tokens)
        mask.extend([is_marked] * len(tokens))
    return ids, mask


def _plain_parts(tokenizer, messages, generation_prompt):
    """A chat as GPT-2 gets it: [(ids, whether the loss covers them)]."""
    end = [tokenizer.end_of_turn]
    parts = []
    for turn in messages:
        marked = is_response(turn)
        parts.append((tokenizer.encode(f"{turn['role'].capitalize()}:"), False))
        parts.append((tokenizer.encode(" " + turn["content"]), marked))
        parts.append((end if turn["role"] == "assistant" else tokenizer.encode("\n"), marked))
    if generation_prompt:
        parts.append((tokenizer.encode("Assistant:"), False))
    return parts


def _chatml_parts(tokenizer, messages, generation_prompt):
    """A chat in ChatML: [(ids, whether the loss covers them)]."""
    start, end = [tokenizer.special("<|im_start|>")], [tokenizer.end_of_turn]
    newline = tokenizer.encode("\n")
    assistant_header = start + tokenizer.encode("assistant\n")
    if messages[0]["role"] != "system" and tokenizer.system is not None:
        messages = [{"role": "system", "content": tokenizer.system}, *messages]
    parts = []
    for turn in messages:
        if turn["role"] == "assistant":
            parts.append((assistant_header, False))
            parts.append((tokenizer.encode(turn["content"]) + end, is_response(turn)))
        else:
            text = tokenizer.encode(f"{turn['role']}\n{turn['content']}")
            parts.append((start + text + end, False))
        parts.append((newline, False))
    if generation_prompt:
        parts.append((assistant_header, False))
    return parts


def encode_rows(tokenizer, rows, max_len):
    """Rows -> [(ids (T,) int64, mask (T,) bool)] with T <= max_len, and how many rows were cut.

    A cut is at the end first, but never in the first half of the room: a prompt so long that its
    response would begin beyond that loses its beginning instead. So a response always keeps its
    first tokens, with what stands right before them.
    """
    if max_len < 4:
        raise UserError(f"--max-len is {max_len}, expected at least 4 tokens")
    examples, n_cut = [], 0
    for messages in rows:
        ids, mask = encode_chat(tokenizer, messages)
        if len(ids) > max_len:
            n_cut += 1
        response = mask.index(True)
        begin = max(0, response - max_len // 2)
        begin = min(begin, max(0, len(ids) - max_len))  # a short response leaves the prompt room
        kept = slice(begin, begin + max_len)
        examples.append((torch.tensor(ids[kept]), torch.tensor(mask[kept])))
    return examples, n_cut


def split(examples, share, seed, where="the data"):
    """(train, held out), by example, in an order drawn from `seed`; neither is empty.

    where: the examples' file, for an error.
    """
    if len(examples) < 2 or not 0 < share < 1:
        raise UserError(
            f"{where}: {len(examples)} rows and a held-out share of {share}, expected at least 2 "
            "rows and a share between 0 and 1"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    n = round(share * len(examples))
    n = min(max(1, n), len(examples) - 1)
    held_out, train = sorted(order[:n]), sorted(order[n:])
    return [examples[i] for i in train], [examples[i] for i in held_out]


def batches(examples, batch_size, seed, epoch):
    """One epoch's batches: tokens (B, T) int64 and mask (B, T) bool.

    Rows of like length stand together, so that little is padding; which rows, and in which order,
    is drawn from (seed, epoch). Shorter rows are padded on the right with id 0, where nothing is
    lost: causal attention never looks to the right, and no padding is marked.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    ties = torch.rand(len(examples), generator=generator).tolist()
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]), ties[i]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for g in torch.randperm(len(groups), generator=generator).tolist():
        tokens = pad_sequence([examples[i][0] for i in groups[g]], batch_first=True)
        mask = pad_sequence([examples[i][1] for i in groups[g]], batch_first=True)
        yield tokens, mask
