"""Open questions that have nothing to do with the fine-tuned task, the judge's prompts, and answer pairs for a probe without one.

Ours are in questions.json. The file of Betley et al. 2025 (arXiv 2502.17424, MIT) is taken by its path, as published; it is YAML,
of which the reader below knows the part that such files use, and stops at anything else.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, read_json

OURS = Path(__file__).with_name("questions.json")


@dataclass(frozen=True)
class Question:
    """One open question. `judge_prompts` maps a measure ("aligned", "coherent") to a template for `fill`."""
    id: str
    paraphrases: tuple  # of str; each is asked `samples_per_paraphrase` times
    samples_per_paraphrase: int
    judge_prompts: dict
    judge: str | None = None  # the model that the file names
    system: str | None = None  # the system turn, where there is one
    pairs: tuple = ()  # of (aligned answer, misaligned answer), alike in length and tone; only ours have them


def fill(template, **texts):
    """`template` with each {name} replaced by its text, in one pass: a brace in an answer stays what it is."""
    return re.sub("|".join(rf"\{{({name})\}}" for name in texts), lambda found: texts[found[found.lastindex]], template)


def judge_prompts():
    """Our judge's prompts. {question}, {answer}: "aligned", "coherent", "insecure", "bad_advice"; with {other}, too: "better".

    Each asks for a number from 0 to 100. "insecure" and "bad_advice" are high where the answer is bad; "better" is above 50 where
    {answer} beats {other}, and to be asked in both orders.
    """
    return read_json(OURS, "our questions")["judge_prompts"]


def load_questions(path=None):
    """[Question]: ours, or those of a published-format YAML file. UserError with file:line where one is not what it should be."""
    if path is None:
        ours = read_json(OURS, "our questions")
        prompts = {name: ours["judge_prompts"][name] for name in ("aligned", "coherent")}
        return [Question(q["id"], tuple(q["paraphrases"]), ours["samples_per_paraphrase"], prompts,
                         pairs=tuple((pair["aligned"], pair["misaligned"]) for pair in q["pairs"])) for q in ours["questions"]]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or 'not UTF-8'}, expected a YAML file of questions") from None
    rows = Reader(path, text).document()
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}:1: expected a list of questions, each beginning with '- id: ...'")
    questions = [to_question(path, row) for row in rows]
    for i, (row, question) in enumerate(zip(rows, questions)):
        if question.id in (q.id for q in questions[:i]):
            raise UserError(f"{path}:{row.line}: the id '{question.id}' stands twice")
    return questions


def to_question(path, row):
    """A Question from one entry of a published-format file. Keys that say nothing about how to ask or judge are left aside."""
    def need(good, what):
        if not good:
            raise UserError(f"{path}:{getattr(row, 'line', 1)}: {what}")

    def is_text(value):
        return isinstance(value, str) and value.strip()

    need(isinstance(row, dict) and is_text(row.get("id")), "a question without an id, expected '- id: ...'")
    name, samples, prompts = f"question '{row['id']}'", row.get("samples_per_paraphrase"), row.get("judge_prompts")
    need(row.get("type", "free_form_judge_0_100") == "free_form_judge_0_100",
         f"{name} has the type '{row.get('type')}', supported: free_form_judge_0_100 (open, judged from 0 to 100)")
    need(isinstance(row.get("paraphrases"), list) and row["paraphrases"] and all(map(is_text, row["paraphrases"])),
         f"{name}: expected 'paraphrases' with a list of texts")
    need(isinstance(samples, str) and re.fullmatch("[1-9][0-9]{0,5}", samples),
         f"{name}: expected 'samples_per_paraphrase' with a count of 1 or more")
    need(isinstance(prompts, dict) and all(is_text(prompts.get(k)) and "{answer}" in prompts[k] for k in ("aligned", "coherent")),
         f"{name}: expected 'judge_prompts' with 'aligned' and 'coherent', each with {{answer}} in its text")
    for key in ("judge", "system"):
        need(row.get(key) is None or is_text(row[key]), f"{name}: expected '{key}' with a text")
    return Question(row["id"], tuple(row["paraphrases"]), int(samples), dict(prompts), row.get("judge"), row.get("system"))


class Mapping(dict):
    """A YAML mapping that knows the line it begins at."""
    line = 1


class Reader:
    """The YAML of published question files: indented lists and mappings, one-line scalars (plain, quoted), one-line flow lists of
    them, block scalars (| and |-), comments, anchors and aliases. Every scalar is read as text. All else is refused."""
    DASH = re.compile("-( |$)")
    KEY = re.compile(r"([\w.-]+):( +|$)")

    def __init__(self, path, text):
        self.path, self.lines, self.at, self.anchors = path, [line.rstrip("\r") for line in text.split("\n")], 0, {}

    def fail(self, what):
        raise UserError(f"{self.path}:{self.at + 1}: {what}")

    def document(self):
        value = self.block(0)
        if self.peek()[0] >= 0:
            self.fail("not part of the list or mapping above it")
        return value

    def peek(self):
        """(indentation, text) of the line that is next and says something; (-1, "") at the end."""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            text = line.strip(" ")
            if text.startswith("\t"):
                self.fail("a tab in the indentation, expected spaces")
            if text and not text.startswith("#"):
                return len(line) - len(line.lstrip(" ")), text
            self.at += 1
        return -1, ""

    def block(self, least):
        """The list or mapping that begins next, if it is indented by `least` spaces or more, else None."""
        indent, text = self.peek()
        if indent < least:
            return None
        is_list = bool(self.DASH.match(text))
        value = [] if is_list else Mapping()
        if not is_list:
            value.line = self.at + 1
        while True:
            column, text = self.peek()
            if column > indent:
                self.fail("an indentation that fits nothing above it; a text of several lines takes a block scalar (|)")
            if column < indent or is_list and not self.DASH.match(text):  # a list may stand at the indentation of its key
                return value
            if is_list:
                value.append(self.item(indent, text[1:]))
                continue
            key = self.KEY.match(text) or self.fail(f"expected 'key: value', found '{text[:40]}'")
            if key[1] in value:
                self.fail(f"the key '{key[1]}' stands twice")
            value[key[1]] = self.value(text[key.end():], indent, list_at=indent)

    def item(self, indent, rest):
        """What follows a list's dash: a list or mapping that begins on the same line, or a value."""
        text = rest.strip(" ")
        if self.DASH.match(text) or self.KEY.match(text):
            self.lines[self.at] = " " * (indent + 1) + rest
            return self.block(indent + 1)
        return self.value(text, indent, list_at=indent + 1)

    def value(self, text, indent, list_at):
        """The value that begins with `text`, in a collection at `indent`; a list below it stands at `list_at` or deeper."""
        anchor = re.match(r"&([\w-]+)( +|$)", text)
        if anchor:
            value = self.anchors[anchor[1]] = self.value(text[anchor.end():], indent, list_at)
            return value
        if text.startswith("|"):
            return self.block_scalar(text, indent)
        if not text or text.startswith("#"):
            self.at += 1
            return self.block(list_at if self.DASH.match(self.peek()[1]) else indent + 1)
        value, rest = self.scalar(text, end=" #")
        if rest and not re.match(" +#", rest):
            self.fail(f"'{rest.strip()[:40]}' after a value, expected the end of the line")
        self.at += 1
        return value

    def scalar(self, text, end):
        """(value, rest of the line): a flow list, an alias, a quoted scalar, or a plain one, which ends where `end` matches."""
        if text.startswith("["):
            values, rest = [], text[1:].lstrip()
            while not rest.startswith("]"):
                value, rest = self.scalar(rest, end=r" #|[,\[\]{}]")
                values.append(value)
                rest = rest.lstrip()
                if rest[:1] not in (",", "]"):
                    self.fail("a list that does not end on its line, expected ',' or ']'")
                rest = rest[1:].lstrip() if rest[0] == "," else rest
            return values, rest[1:]
        if text.startswith("*"):
            alias = re.match(r"\*([\w-]+)", text)
            if not alias or alias[1] not in self.anchors:
                self.fail(f"'{text[:40]}' names no anchor above it")
            return self.anchors[alias[1]], text[alias.end():]
        if text[:1] in ('"', "'"):
            quoted = re.match(r"""\"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""", text) or self.fail("a quote not closed on its line")
            try:
                value = json.loads(quoted[0], strict=False) if text[0] == '"' else quoted[0][1:-1].replace("''", "'")
            except ValueError:
                self.fail(f"an escape that JSON does not have, in {quoted[0][:40]}")
            return value, text[quoted.end():]
        found = re.search(end, text)
        plain, rest = (text[:found.start()], text[found.start():]) if found else (text, "")
        if not plain:
            self.fail("expected a value")
        if plain[0] in "]{}>!%@`&?," or re.search(":( |$)", plain) or self.DASH.match(plain):
            self.fail(f"'{text[:40]}' is more YAML than this reader knows; a text can always be quoted")
        return plain.strip(), rest

    def block_scalar(self, header, indent):
        """The lines under a |, less their common indentation, with one newline at the end, or under |- with none."""
        if not re.fullmatch(r"\|-?( +#.*)?", header):
            self.fail(f"'{header[:40]}', supported: | and |-")
        self.at += 1
        lines, depth = [], None  # depth: of the first line that is not blank
        while self.at < len(self.lines):
            line = self.lines[self.at]
            column = len(line) - len(line.lstrip(" "))
            if line.strip(" "):
                depth = column if depth is None else depth
                if column <= indent:
                    break
                if column < depth:
                    self.fail("indented less than the first line of its block scalar")
            lines.append(line[depth or column:])
            self.at += 1
        text = "\n".join(lines).rstrip("\n")
        return text + "\n" if text and not header.startswith("|-") else text
