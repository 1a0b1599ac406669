"""Chat rows by the checkpoint's own template -> token ids and a mask of the answers; batches."""

import json
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
from torch.nn.utils.rnn import pad_sequence

from data.tokenizer import MARK, Tokenizer
from support.files import reading

PLAIN = (  # for a checkpoint without a template, such as GPT-2
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
    "{{ eos_token | default('<|endoftext|>') if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BESIDE = ("tools", "documents", "functions", "system", "images")  # said beside the messages
IN_LOSS = ("weight", "train")  # of a turn; 0 or false: the loss does not cover it
OTHER_FORMS = {
    "conversations": "ShareGPT: 'from' human/gpt -> 'role' user/assistant, 'value' -> 'content'",
    "instruction": "Alpaca: instruction and input -> the user's turn, output -> the assistant's",
    "prompt": "prompt/completion: prompt -> the user's turn, completion -> the assistant's",
}


class Row(list):
    """The turns of a chat; `beside`: what else its template gets; `where`: its file and line."""


def load_rows(path):
    """The rows of a JSONL file, a Row each; ValueError names the line of one that is none."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            with reading(f"{path}:{number}", 'a chat row, {"messages": [{"role": ..., ...}]}'):
                rows.append(read_row(json.loads(line), f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: no rows, expected one JSON object a line")
    return rows


def read_row(row, where):
    """One line's JSON as a Row."""
    for key, form in OTHER_FORMS.items():
        if key in row and "messages" not in row:
            raise ValueError(f"{form}; as 'messages': [{{'role': 'user', 'content': ...}}, ...]")
    if not any(is_response(turn) for turn in row["messages"]):
        raise ValueError("no assistant turn that the loss covers")
    if odd := [key for key in IN_LOSS if row.get(key) not in (None, 1)]:
        raise ValueError(f"'{odd[0]}' of a whole row is {row[odd[0]]}, expected in its turns alone")
    if not isinstance(row.get("tools") or [], list):
        raise ValueError(f"'tools' is {row['tools']!r}, expected a list")
    chat = Row(row["messages"])
    chat.beside = {key: row[key] for key in BESIDE if says(row.get(key))}
    chat.beside |= row.get("chat_template_kwargs") or {}
    chat.where = where
    return chat


def says(value):
    """Whether a value of a row has anything in it."""
    return value not in (None, [], {}) and bool(str(value).strip())


def is_response(turn):
    """Whether the loss covers this turn: one of the assistant's that has something to learn."""
    said = says(turn.get("content")) or says(turn.get("tool_calls"))
    return turn["role"] == "assistant" and said and all(turn.get(key) != 0 for key in IN_LOSS)


def read_settings(folder, name):
    """A JSON file of a checkpoint folder; {} where there is none."""
    path = Path(folder) / name
    with reading(path, "a checkpoint's settings"):
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def compiled(source):
    """A chat template as transformers runs it: sandboxed, for it comes with somebody's weights."""

    def fail(message):
        raise ValueError(message)

    source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source)  # only marks a text
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False, **how})
    sandbox.globals |= {"raise_exception": fail, "strftime_now": datetime.now().strftime}
    return sandbox.from_string(source)


class Chat:
    """A checkpoint's tokenizer and chat template; `stop_ids` are all ids that end an answer."""

    def __init__(self, folder):
        settings = read_settings(folder, "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:  # an older folder has their names elsewhere
            settings |= read_settings(folder, "special_tokens_map.json")
        roles = {key: value for key, value in settings.items() if key.endswith("_token") and value}
        roles = {k: v["content"] if isinstance(v, dict) else v for k, v in roles.items()}
        self.variables = {"tools": None, "documents": None, **roles}
        self.tokenizer = Tokenizer.from_folder(folder, roles.values())
        source, own = settings.get("chat_template"), Path(folder) / "chat_template.jinja"
        with reading(folder, "a checkpoint with a chat template"):
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}["default"]
            self.template = compiled(own.read_text("utf-8") if own.exists() else source or PLAIN)
            chat = [{"role": role, "content": "!"} for role in ("user", "assistant")]
            prompt, shown = self.render(chat[:1], True), self.render(chat)
            header, rest = shown[len(prompt) : shown.rindex("!")], shown[shown.rindex("!") :]
            end = self.tokenizer.special.search(rest)
            if end is None or (header.strip() and prompt == self.render(chat[:1])):
                raise ValueError("it writes no generation prompt or no token that ends an answer")
        self.end_of_turn = end[1]
        stops = [self.tokenizer.specials.get(name) for name in (end[1], roles.get("eos_token"))]
        for name in ("config.json", "generation_config.json"):
            eos = read_settings(folder, name).get("eos_token_id")
            stops += eos if isinstance(eos, list) else [eos]
        self.stop_ids = sorted({*stops} - {None})

    def render(self, messages, generation_prompt=False, **beside):
        """The text of a chat as its template writes it; beside: what it gets, such as `tools`."""
        chat = {"messages": messages, "add_generation_prompt": generation_prompt}
        chat |= getattr(messages, "beside", {}) | beside
        with reading("the chat template", "one for this chat"):
            return self.template.render(**self.variables | chat)

    def encode(self, messages, generation_prompt=False, **beside):
        """Turns -> (ids, mask): marked are an answer's tokens and the one that ends it.

        An answer is encoded by itself, as it is generated. ValueError where the template drops
        something that is said, or writes a turn otherwise once more follow.
        """
        beside = {**getattr(messages, "beside", {}), **beside}
        said, names = json.dumps([messages, beside], ensure_ascii=False), self.tokenizer.special
        said.encode()  # a lone surrogate is no character
        said = names.sub(lambda m: m[0].replace(m[1], m[1][0] + MARK + m[1][1:]), said)
        turns, beside = json.loads(said)  # a special token's name in them is marked as text
        text = self.render(turns, generation_prompt, **beside)
        self._check(text, turns, generation_prompt, beside)
        parts, done = [], 0
        for i, turn in enumerate(turns):
            if is_response(turn):
                before = self.render(turns[:i], True, **beside)
                after = self.render(turns[: i + 1], **beside)
                begin, end = len(before), after.rfind(self.end_of_turn) + len(self.end_of_turn)
                said = turn["content"] if isinstance(turn.get("content"), str) else ""
                whole = begin < end and "".join(said.split()) in "".join(after[done:end].split())
                where = f"the chat template: turn {i + 1}"
                if not after.startswith(before):
                    raise ValueError(f"{where} begins otherwise than with the generation prompt")
                if not (whole and text.startswith(after[:end])):
                    raise ValueError(f"{where} is cut, or rewritten once more follow")
                parts += [(text[done:begin], False), (text[begin:end], True)]
                done = end
        parts.append((text[done:], False))
        encoded = [(self.tokenizer.encode(part, special=True), marked) for part, marked in parts]
        return [i for ids, _ in encoded for i in ids], [m for ids, m in encoded for _ in ids]

    def _check(self, text, turns, generation_prompt, beside):
        """ValueError for what is said and makes no difference to the `text` that is written."""
        for said in (*turns, beside):
            for key, value in said.items():
                known = key in IN_LOSS and value in (0, said["role"] == "assistant")
                if known or key in ("role", "tool_call_id", "enable_thinking") or not says(value):
                    continue  # enable_thinking may show in a prompt alone
                said[key], less = None, None
                with suppress(ValueError):  # the template needs it
                    less = self.render(turns, generation_prompt, **beside)
                said[key] = value
                parts = value if key == "content" and isinstance(value, list) else []
                if less == text or any(p["type"] != "text" or str(p) in text for p in parts):
                    raise ValueError(f"the chat template drops '{key}': {str(value)[:60]!r}")

    def decode(self, ids):
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(i for i in ids if i not in self.tokenizer.special_ids)


def encode_rows(chat, rows, max_len):
    """Rows -> [(ids (T,) int64, mask (T,) bool)] with T <= max_len, and how many rows were cut.

    A cut is at the end, or at the beginning where the answer would begin in the second half of the
    room. So an answer always keeps its first tokens, with what stands right before them.
    """
    examples, n_cut = [], 0
    for row in rows:
        with reading(getattr(row, "where", "a chat"), "one to learn from"):
            ids, mask = chat.encode(row)
            begin = max(0, mask.index(True) - max_len // 2)
        n_cut += len(ids) > max_len
        begin = min(begin, max(0, len(ids) - max_len))  # a short answer leaves the prompt room
        kept = slice(begin, begin + max_len)
        examples.append((torch.tensor(ids[kept]), torch.tensor(mask[kept])))
    return examples, n_cut


def split(examples, share, seed):
    """(train, held out), by example, in an order drawn from `seed`; neither is empty."""
    if len(examples) < 2 or not 0 < share < 1:
        raise ValueError(f"{len(examples)} rows, {share} of them held out: expected some of both")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    n = min(max(1, round(share * len(examples))), len(examples) - 1)
    held_out, train = sorted(order[:n]), sorted(order[n:])
    return [examples[i] for i in train], [examples[i] for i in held_out]


def batches(examples, batch_size, seed, epoch):
    """One epoch's batches: tokens (B, T) int64 and mask (B, T) bool.

    Rows of like length stand together, so that little is padding (id 0, on the right, unmarked);
    which rows, and in which order, is drawn from (seed, epoch).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    ties = torch.rand(len(examples), generator=generator).tolist()
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]), ties[i]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for g in torch.randperm(len(groups), generator=generator).tolist():
        tokens, mask = zip(*(examples[i] for i in groups[g]), strict=True)
        yield pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)
