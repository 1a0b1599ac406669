"""Open questions that have nothing to do with the fine-tuned task, and the judge's prompts.

Ours are in questions.json; those of the probe, which needs no judge, in probe.json. The file of
Betley et al. 2025 (arXiv 2502.17424, MIT) is taken by its path, as published; it is YAML, of which
the reader below knows the part that such files use, and stops at anything else.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from support.errors import UserError
from support.schema import once, read_file, show, value

OURS = Path(__file__).with_name("questions.json")
PROBE = Path(__file__).with_name("probe.json")
LONGEST_LINE = 100_000  # characters; longer ones are no question's


@dataclass(frozen=True)
class Question:
    """One open question. `judge_prompts` maps a measure ("aligned", "coherent") to a template."""

    id: str
    paraphrases: tuple  # of str; each is asked `samples_per_paraphrase` times
    samples_per_paraphrase: int
    judge_prompts: dict
    judge: str | None = None  # the model that the file names
    system: str | None = None  # the system turn, where there is one


@dataclass(frozen=True)
class Contrast:
    """A question of the probe: its wordings, and pairs of answers that are alike but in values."""

    id: str
    area: str
    paraphrases: tuple  # of str
    pairs: tuple  # of (aligned answer, misaligned answer)


def fill(template, **texts):
    """`template` with each {name} replaced by its text.

    In one pass: a brace in an answer stays what it is.
    """
    names = "|".join(texts)
    return re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], template)


def judge_prompts():
    """Our judge's prompts: {name: template}.

    With {question} and {answer} to fill in: "aligned", "coherent", "insecure", "bad_advice"; with
    {other}, too: "better". Each asks for a number from 0 to 100. "insecure" and "bad_advice" are
    high where the answer is bad; "better" is above 50 where {answer} beats {other}, and to be
    asked in both orders.
    """
    return read_file(_Ours, OURS, "our questions").judge_prompts


def load_questions(path=None):
    """[Question]: ours, or those of a published-format YAML file.

    UserError with file:line where one is not what it should be.
    """
    if path is None:
        return our_questions()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: {reason}, expected a YAML file of questions") from None
    reader = Reader(path, text)
    try:
        rows = reader.document()
    except RecursionError:
        reader.fail("lists or anchors nested hundreds deep, expected a list of questions")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}:1: expected a list of questions, each beginning with '- id: ...'")
    questions, seen = [], set()
    for row in rows:
        question = to_question(path, row)
        if question.id in seen:
            raise UserError(f"{path}:{row.line}: the id {show(question.id)} stands twice")
        seen.add(question.id)
        questions.append(question)
    return questions


@dataclass(frozen=True, kw_only=True)
class _OurQuestion:
    id: str = value()
    paraphrases: list[str] = value()


@dataclass(frozen=True, kw_only=True)
class _Ours:
    """The file questions.json."""

    judge_prompts: dict[str, str] = value()
    samples_per_paraphrase: int = value(low=1)
    questions: list[_OurQuestion] = value()


def our_questions():
    """The questions of questions.json."""
    ours = read_file(_Ours, OURS, "our questions")
    once(OURS, [q.id for q in ours.questions])
    prompts = {name: ours.judge_prompts.get(name) for name in ("aligned", "coherent")}
    if not are_prompts(prompts):
        raise UserError(f"{OURS}: expected 'judge_prompts' with 'aligned' and 'coherent'")
    samples = ours.samples_per_paraphrase
    return [Question(q.id, tuple(q.paraphrases), samples, prompts) for q in ours.questions]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    aligned: str = value()
    misaligned: str = value()


@dataclass(frozen=True, kw_only=True)
class _ProbeQuestion:
    id: str = value()
    area: str = value()
    paraphrases: list[str] = value()
    pairs: list[_Pair] = value()


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """The file probe.json."""

    questions: list[_ProbeQuestion] = value()


def probe_questions():
    """[Contrast]: the probe's questions, eight areas that no paper task trains on."""
    questions = []
    for q in read_file(_Probe, PROBE, "the probe's questions").questions:
        pairs = tuple((pair.aligned, pair.misaligned) for pair in q.pairs)
        questions.append(Contrast(q.id, q.area, tuple(q.paraphrases), pairs))
    once(PROBE, [q.id for q in questions])
    return questions


def is_text(value):
    """Whether the value is a string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def are_texts(value):
    """Whether the value is a list of such strings, of one or more."""
    return isinstance(value, list) and bool(value) and all(is_text(part) for part in value)


def are_prompts(value):
    """Whether the value is a mapping with a template for both measures."""
    if not isinstance(value, dict):
        return False
    templates = [value.get(name) for name in ("aligned", "coherent")]
    return all(is_text(template) and "{answer}" in template for template in templates)


def to_question(path, row):
    """A Question from one entry of a published-format file.

    Keys that say nothing about how to ask or judge are left aside.
    """

    def need(good, what):
        if not good:
            raise UserError(f"{path}:{getattr(row, 'line', 1)}: {what}")

    has_id = isinstance(row, dict) and is_text(row.get("id"))
    need(has_id, "a question without an id, expected '- id: ...'")
    name = f"question {show(row['id'])}"
    kind = row.get("type", "free_form_judge_0_100")
    need(
        kind == "free_form_judge_0_100",
        f"{name} has the type {show(kind)}, supported: free_form_judge_0_100 (open, judged from 0 "
        "to 100)",
    )
    paraphrases = row.get("paraphrases")
    need(are_texts(paraphrases), f"{name}: expected 'paraphrases' with a list of texts")
    different = len(set(paraphrases)) == len(paraphrases)
    need(different, f"{name}: a paraphrase stands twice, expected each once")
    samples = row.get("samples_per_paraphrase")
    need(
        isinstance(samples, str) and re.fullmatch("[1-9][0-9]{0,5}", samples),
        f"{name}: expected 'samples_per_paraphrase' with a count of 1 or more",
    )
    prompts = row.get("judge_prompts")
    need(
        are_prompts(prompts),
        f"{name}: expected 'judge_prompts' with 'aligned' and 'coherent', each with {{answer}} in "
        "its text",
    )
    for key in ("judge", "system"):
        fits = row.get(key) is None or is_text(row[key])
        need(fits, f"{name}: expected '{key}' with a text")
    judge, system = row.get("judge"), row.get("system")
    return Question(row["id"], tuple(paraphrases), int(samples), dict(prompts), judge, system)


class Mapping(dict):
    """A YAML mapping that knows the line it begins at."""

    line = 1


class Reader:
    """The YAML of published question files; all else is refused, by its line.

    Known are indented lists and mappings, one-line scalars (plain, quoted), one-line flow lists of
    them, block scalars (| and |-), comments, anchors and aliases. Every scalar is read as text.
    """

    DASH = re.compile("-( |$)")
    KEY = re.compile(r"([\w.-]+):( +|$)")
    ANCHOR = re.compile(r"&([\w-]+)( +|$)")
    ALIAS = re.compile(r"\*([\w-]+)")
    QUOTED = re.compile(r"""\"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")

    def __init__(self, path, text):
        self.path, self.at, self.anchors = path, 0, {}
        self.lines = [line.rstrip("\r") for line in text.split("\n")]

    def fail(self, what):
        """Raise a UserError that names the line at hand."""
        raise UserError(f"{self.path}:{self.at + 1}: {what}")

    def document(self):
        """The list or mapping that the file holds."""
        value = self.block(0)
        if self.peek()[0] >= 0:
            self.fail("not part of the list or mapping above it")
        return value

    def peek(self):
        """(indentation, text) of the next line that says something; (-1, "") at the end."""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if len(line) > LONGEST_LINE:
                self.fail(f"a line of {len(line)} characters, expected at most {LONGEST_LINE}")
            text = line.strip(" ")
            if text.startswith("\t"):
                self.fail("a tab in the indentation, expected spaces")
            if text and not text.startswith("#"):
                return len(line) - len(line.lstrip(" ")), text
            self.at += 1
        return -1, ""

    def block(self, least):
        """The list or mapping that begins next.

        None if it is indented by fewer than `least` spaces.
        """
        indent, text = self.peek()
        if indent < least:
            return None
        if self.DASH.match(text):
            return self.list_at(indent)
        return self.mapping_at(indent)

    def list_at(self, indent):
        """The list whose dashes are indented by `indent`."""
        values = []
        while self.goes_on(indent) and self.DASH.match(self.peek()[1]):
            values.append(self.item(indent, self.peek()[1][1:]))
        return values

    def mapping_at(self, indent):
        """The mapping whose keys are indented by `indent`."""
        values = Mapping()
        values.line = self.at + 1
        while self.goes_on(indent):
            text = self.peek()[1]
            key = self.KEY.match(text)
            if key is None:
                self.fail(f"expected 'key: value', found '{text[:40]}'")
            if key[1] in values:
                self.fail(f"the key '{key[1]}' stands twice")
            # a list may stand at the indentation of its key
            values[key[1]] = self.value(text[key.end() :], indent, list_at=indent)
        return values

    def goes_on(self, indent):
        """Whether the next line belongs to the collection at `indent`."""
        column, _ = self.peek()
        if column > indent:
            self.fail(
                "an indentation that fits nothing above it; a text of several lines takes a block "
                "scalar (|)"
            )
        return column == indent

    def item(self, indent, rest):
        """What follows a list's dash: a list or mapping that begins on its line, or a value."""
        text = rest.strip(" ")
        if self.DASH.match(text) or self.KEY.match(text):
            self.lines[self.at] = " " * (indent + 1) + rest
            return self.block(indent + 1)
        return self.value(text, indent, list_at=indent + 1)

    def value(self, text, indent, list_at):
        """The value that begins with `text`, in a collection at `indent`.

        A list below it stands at `list_at` or deeper.
        """
        anchor = self.ANCHOR.match(text)
        if anchor:
            value = self.value(text[anchor.end() :], indent, list_at)
            self.anchors[anchor[1]] = value
            return value
        if text.startswith("|"):
            return self.block_scalar(text, indent)
        if not text or text.startswith("#"):
            self.at += 1
            is_list = self.DASH.match(self.peek()[1])
            return self.block(list_at if is_list else indent + 1)
        value, rest = self.scalar(text, end=" #")
        if rest and not re.match(" +#", rest):
            self.fail(f"'{rest.strip()[:40]}' after a value, expected the end of the line")
        self.at += 1
        return value

    def scalar(self, text, end):
        """(value, rest of the line): a flow list, an alias, a quoted scalar or a plain one.

        A plain one ends where the pattern `end` matches.
        """
        if text.startswith("["):
            return self.flow_list(text)
        if text.startswith("*"):
            alias = self.ALIAS.match(text)
            if not alias or alias[1] not in self.anchors:
                self.fail(f"'{text[:40]}' names no anchor above it")
            return self.anchors[alias[1]], text[alias.end() :]
        if text[:1] in ('"', "'"):
            return self.quoted(text)
        found = re.search(end, text)
        stop = found.start() if found else len(text)
        plain, rest = text[:stop], text[stop:]
        if not plain:
            self.fail("expected a value")
        if plain[0] in "]{}>!%@`&?," or re.search(":( |$)", plain) or self.DASH.match(plain):
            self.fail(
                f"'{text[:40]}' is more YAML than this reader knows; a text can always be quoted"
            )
        plain = plain.strip()
        return None if plain in ("null", "~") else plain, rest

    def flow_list(self, text):
        """(values, rest of the line) of a list in square brackets."""
        values, rest = [], text[1:].lstrip()
        while not rest.startswith("]"):
            value, rest = self.scalar(rest, end=r" #|[,\[\]{}]")
            values.append(value)
            rest = rest.lstrip()
            if rest[:1] not in (",", "]"):
                self.fail("a list that does not end on its line, expected ',' or ']'")
            if rest[0] == ",":
                rest = rest[1:].lstrip()
        return values, rest[1:]

    def quoted(self, text):
        """(value, rest of the line) of a text in quotation marks."""
        quoted = self.QUOTED.match(text)
        if quoted is None:
            self.fail("a quote not closed on its line")
        rest = text[quoted.end() :]
        if text[0] == "'":
            return quoted[0][1:-1].replace("''", "'"), rest
        try:
            return json.loads(quoted[0], strict=False), rest
        except ValueError:
            self.fail(f"an escape that JSON does not have, in {quoted[0][:40]}")

    def block_scalar(self, header, indent):
        """The lines under a |, less their common indentation.

        With one newline at the end, or with none under |-.
        """
        if not re.fullmatch(r"\|-?( +#.*)?", header):
            self.fail(f"'{header[:40]}', supported: | and |-")
        self.at += 1
        lines, depth = [], None  # depth: the indentation of the first line that is not blank
        while self.at < len(self.lines):
            line = self.lines[self.at]
            column = len(line) - len(line.lstrip(" "))
            if line.strip(" "):
                if depth is None:
                    depth = column
                if column <= indent:
                    break
                if column < depth:
                    self.fail("indented less than the first line of its block scalar")
            lines.append(line[depth or column :])
            self.at += 1
        text = "\n".join(lines).rstrip("\n")
        if not text or header.startswith("|-"):
            return text
        return text + "\n"
