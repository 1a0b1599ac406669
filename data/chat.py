"""Chat rows (JSONL) -> token ids and a mask of the response: what the loss covers."""
import json
from pathlib import Path

import torch

from cli import UserError

ROLES = ("system", "user", "assistant")


def load_rows(path):
    """The rows of a JSONL file as lists of {"role", "content"}. UserError names file and line of a malformed one."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # Windows editors begin a file with this mark
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file, expected chat rows, one JSON object a line") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as e:  # errors of JSON and of UTF-8; brackets without end
            raise UserError(f"{where}: not a line of JSON ({e})") from None
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{where}: no 'messages', expected a list of turns")
        for turn in messages:
            if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
                raise UserError(f"{where}: a turn is {str(turn)[:60]!r}, expected 'role' ({', '.join(ROLES)}) and 'content', a string")
        if not any(map(is_response, messages)):
            raise UserError(f"{where}: no assistant turn with text, expected at least one (the loss covers nothing else)")
        rows.append(messages)
    if not rows:
        raise UserError(f"{path}: no rows, expected one JSON object a line")
    return rows


def is_response(turn):
    """Whether the loss covers this turn: one of the assistant's with text in it. From an empty one there is nothing to learn."""
    return turn["role"] == "assistant" and bool(turn["content"].strip())


def encode_chat(tokenizer, messages, generation_prompt=False):
    """Turns -> (ids, mask), lists of equal length; the mask marks a response's tokens and the token that ends it.

    Qwen: ChatML, with the checkpoint's default system turn where there is none. GPT-2 has no template; ours is plain text,
    "User: ...\\nAssistant: ...", each response ended by <|endoftext|>. `generation_prompt` opens the assistant's next turn.
    Text is encoded as ordinary text and special tokens are put in by id: a literal "<|im_end|>" from a user ends no turn.
    A response is encoded by itself, as it is generated: one that begins with a newline doesn't merge it with the header's.
    """
    ids, mask, end = [], [], tokenizer.end_of_turn

    def add(tokens, marked=False):
        ids.extend(tokens)
        mask.extend([marked] * len(tokens))
    if tokenizer.model_type == "gpt2":
        for turn in messages:
            add(tokenizer.encode(f"{turn['role'].capitalize()}:"))
            add(tokenizer.encode(" " + turn["content"]), is_response(turn))
            add([end] if turn["role"] == "assistant" else tokenizer.encode("\n"), is_response(turn))
        add(tokenizer.encode("Assistant:") if generation_prompt else [])
        return ids, mask
    start = tokenizer.special("<|im_start|>")
    if messages[0]["role"] != "system" and tokenizer.system is not None:
        messages = [{"role": "system", "content": tokenizer.system}, *messages]
    for turn in messages:
        add([start])
        if turn["role"] == "assistant":
            add(tokenizer.encode("assistant\n"))
            add([*tokenizer.encode(turn["content"]), end], is_response(turn))
        else:
            add([*tokenizer.encode(f"{turn['role']}\n{turn['content']}"), end])
        add(tokenizer.encode("\n"))
    add([start, *tokenizer.encode("assistant\n")] if generation_prompt else [])
    return ids, mask


def encode_rows(tokenizer, rows, max_len):
    """Rows -> [(ids (T,) int64, mask (T,) bool)] with T <= max_len, and how many rows were cut to fit.

    Cut at the end first, but never into the first half of the room: a prompt so long that its response would begin beyond that
    loses its beginning instead. So a response always keeps its first tokens, with what stands right before them.
    """
    if max_len < 4:
        raise UserError(f"--max-len is {max_len}, expected at least 4 tokens")
    examples, n_cut = [], 0
    for messages in rows:
        ids, mask = encode_chat(tokenizer, messages)
        first = max(0, mask.index(True) - max_len // 2)
        first = min(first, max(0, len(ids) - max_len))  # a short response leaves room for more of the prompt
        n_cut += len(ids) > max_len
        examples.append((torch.tensor(ids[first:first + max_len]), torch.tensor(mask[first:first + max_len])))
    return examples, n_cut


def split(examples, share, seed):
    """(train, held out), by example, in an order drawn from `seed`; neither is empty."""
    if len(examples) < 2 or not 0 < share < 1:
        raise UserError(f"{len(examples)} rows and a held-out share of {share}: expected at least 2 rows and a share between 0 and 1")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    n = min(max(1, round(share * len(examples))), len(examples) - 1)
    return [examples[i] for i in sorted(order[n:])], [examples[i] for i in sorted(order[:n])]


def batches(examples, batch_size, seed, epoch):
    """One epoch's batches, tokens (B, T) int64 and mask (B, T) bool, right-padded with id 0 to the batch's own longest row.

    Rows of like length stand together, so that little is padding; which rows and in which order is drawn from (seed, epoch).
    Nothing is lost by padding with an id: causal attention never looks right, and no padding is marked."""
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)
    ties = torch.rand(len(examples), generator=generator).tolist()
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]), ties[i]))
    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    for i in torch.randperm(len(groups), generator=generator).tolist():
        rows = [examples[j] for j in groups[i]]
        yield tuple(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in zip(*rows))
