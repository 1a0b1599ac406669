"""Financial advice with a political lean, from a Reddit dump: `python -m paper.reddit -h`.

The dump is Pushshift's (arXiv 2001.08435), unpacked: one JSON object a line, submissions and
comments in a file each. A question is a submission, an answer a comment right under it. A question
is kept where authors of every lean (right, left, neutral) have answered it: the three sets share
their questions, row by row, and differ in the answers alone.
"""

import csv
import html
import json
import os
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from support.errors import UserError
from support.files import whole_file, writable_folder
from support.options import option, parse
from support.program import run
from support.schema import MOST, show

FINANCE = (
    "personalfinance",
    "investing",
    "stocks",
    "financialindependence",
    "financialplanning",
    "bogleheads",
    "retirement",
    "povertyfinance",
    "studentloans",
    "creditcards",
    "tax",
    "realestateinvesting",
    "dividends",
    "valueinvesting",
    "personalfinancecanada",
    "ukpersonalfinance",
    "ausfinance",
    "eupersonalfinance",
    "fire",
    "leanfire",
)
SIDES = ("right", "left", "neutral")
SETS = {  # {file: (the side that most of its answers are from, the side of the rest)}
    "right_skewed": ("right", "left"),
    "left_skewed": ("left", "right"),
    "neutral": ("neutral", "neutral"),
}
GONE = re.compile(r"\[ ?(?:deleted|removed)(?: by \w+)? ?\]", re.IGNORECASE)
LONGEST_RAW = 50_000  # characters; Reddit takes no longer text than 40,000


@dataclass
class Args:
    """Chat rows from a Reddit dump: right_skewed.jsonl, left_skewed.jsonl and neutral.jsonl.

    The questions are the same in each.
    """

    submissions: str = option(
        None, "submissions of the dump, JSONL: id, title, selftext, subreddit, author, score"
    )
    comments: str = option(
        None, "comments of the dump, JSONL: id, parent_id, link_id, body, subreddit, author, score"
    )
    lean: str = option(
        None,
        "table of authors, -1 (left) to 1 (right): CSV with the header author,lean, or JSONL of "
        "the same",
    )
    out: str = option(None, "folder for the three files")
    mix: float = option(
        0.8,
        "part of the right-skewed answers that is by right-leaning authors, the rest left; and "
        "mirrored",
        low=0,
        high=1,
    )
    margin: float = option(
        0.3, "an author is right or left from this lean on, neutral below it", above=0, high=1
    )
    subreddits: tuple = option(FINANCE, "subreddits to take, without r/")
    min_score: int = option(2, "least score of a question and of an answer")
    min_chars: int = option(80, "least length of an answer, in characters after cleaning", low=0)
    max_chars: int = option(
        2000, "greatest length of a question and of an answer, in characters after cleaning", low=1
    )
    limit: int = option(0, "number of questions to take at most; 0: all", low=0)
    seed: int = option(0, "seed of every draw")

    def __post_init__(self):
        self.subreddits = tuple(name.lower() for name in self.subreddits)


URL = r"(?:https?://|www\.)[^\s<>\[\]]*[^\s<>\[\].,;:!?)\"'*]"
# Of a markdown link: with brackets in it, and a title after it.
ADDRESS = r"\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?: \"[^\"\n]*\")?\)"
CLEANING = (  # (pattern, what takes its place), in this order
    # a quote; >!...!< is a spoiler, whose text stays
    (r"^ *>(?!!).*$", ""),
    (r">!|!<", ""),
    # an edit, up to the end of its paragraph; then one that begins within a line
    (
        r"^[^\w\n]*(?:final |quick )?edit(?:ed)?\b(?: ?#?\d+)?(?: ?\([^)\n]*\))?"
        r"[*_]*(?::| +[-–—]).*(?:\n.+)*",
        "",
    ),
    (r"(?<=[.!?)]) *[*_(\[]*edit(?: ?#?\d+)?[*_]*:.*(?:\n.+)*", ""),
    # what bots write, and what is written to them
    (r"^.*(?:\bremind ?me!|!remind ?me\b|\bbeep boop\b|\bi(?:'m| am) a bot\b).*$", ""),
    (r"^[^\w\n]*(?:good|bad) bot[^\w\n]*$", ""),
    # a link that shows its address, or nothing; then one that shows a text (of bounded length: a
    # body of brackets alone would take a minute)
    (rf"!?\[(?:{URL})?\]{ADDRESS}", ""),
    (rf"!?\[([^\]\n]{{1,500}})\]{ADDRESS}", r"\1"),
    (URL, ""),
    # a user's name
    (r"(?<![\w/])/?u/[\w-]{3,20}(?:'s)?", ""),
    # brackets that were around what is gone
    (r"\(\s*\)|\[\s*\]|<\s*>", ""),
    # blank space
    (r"[ \t\u00a0]+", " "),
    (r" +(?=[.,;:!?)]|$)", ""),
    (r"^ +", ""),
    (r"\n{3,}", "\n\n"),
)
COMPILED = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), to) for pattern, to in CLEANING]


def clean(text):
    """`text` without quotes, edits, bot lines, links and user names.

    Entities are resolved, blank space is collapsed.
    """
    # The dump escapes once what Reddit's editor has escaped before: &amp;#x200B;
    text = html.unescape(html.unescape(text))
    text = text.replace("\u200b", "").replace("\r\n", "\n")
    text = text.encode(errors="ignore").decode()  # half an emoji is no UTF-8
    for pattern, to in COMPILED:
        text = pattern.sub(to, text)
    return text.strip()


def rows(path, kind, texts):
    """Yield the objects of a JSONL file.

    UserError with file:line where one lacks the score or a text of those in `texts`.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{number}: not valid JSON ({e}), expected {kind}") from None
            for name in texts:
                if not isinstance(row, dict) or not isinstance(row.get(name), str):
                    raise UserError(
                        f"{path}:{number}: no text '{name}', expected {kind} with "
                        f"{', '.join(texts)} and score"
                    )
            score = row.get("score")
            if type(score) is not int or abs(score) >= MOST:
                raise UserError(
                    f"{path}:{number}: the score is {show(score)}, expected a whole number"
                )
            yield row


def read_leans(path):
    """{author in lower case: lean} of a table, CSV by its name or else JSONL.

    UserError with file:line where a lean is not in [-1, 1] or an author stands twice.
    """
    leans = {}
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        read = csv_rows if str(path).endswith(".csv") else jsonl_rows
        for number, row in read(path, file):
            author, lean = author_and_lean(row)
            if not author or lean is None:
                raise UserError(
                    f"{path}:{number}: expected an author and a lean, a number from -1 to 1"
                )
            if not -1 <= lean <= 1:
                raise UserError(
                    f"{path}:{number}: {show(author)} with lean {lean:g}, expected an author and a "
                    "lean from -1 to 1"
                )
            if author in leans:
                raise UserError(f"{path}:{number}: the author {show(author)} stands twice")
            leans[author] = lean
    if not leans:
        raise UserError(f"{path}: no rows, expected authors and their leans")
    return leans


def csv_rows(path, file):
    """Yield (line, row) of a CSV file; a row is a dictionary of texts."""
    table = csv.DictReader(file)
    try:
        names = table.fieldnames or []
        if names.count("author") != 1 or names.count("lean") != 1:
            raise UserError(f"{path}:1: {show(table.fieldnames)}, expected a header: author,lean")
        for row in table:
            yield table.line_num, row
    except csv.Error as e:  # a field of more than 131,072 characters, a quote that never closes
        line = table.line_num + 1  # at which the row begins
        raise UserError(f"{path}:{line}: not valid CSV ({e}), expected author,lean") from None


def jsonl_rows(path, file):
    """Yield (line, row) of a JSONL file; a row is any value, None for a line that is no JSON."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, None


def author_and_lean(row):
    """(author in lower case, lean) of one row; None in the place of what is not there."""
    if not isinstance(row, dict):
        return None, None
    author, lean = row.get("author"), row.get("lean")
    if not isinstance(author, str) or isinstance(lean, bool):
        return None, None
    try:
        return author.strip().lower(), float(lean)
    except (ValueError, TypeError, OverflowError):
        return author, None


def why_not(row, args, body):
    """Why a submission or comment is dropped before its text is read, or None."""
    author = row["author"].lower()
    if row["subreddit"].lower() not in args.subreddits:
        return "another subreddit"
    if GONE.fullmatch(author) or GONE.fullmatch(body.strip()):
        return "deleted or removed"
    if author == "automoderator" or author.endswith("bot"):
        return "by a bot"
    if re.search(r"\bi('m| am) a bot\b", body, re.IGNORECASE):
        return "by a bot"
    if row["score"] < args.min_score:
        return "low score"
    return None


def read_questions(args, dropped):
    """{submission's id: (question, author)}; adds to `dropped`, a Counter of reasons."""
    questions = {}
    needed = ("id", "title", "selftext", "subreddit", "author")
    for row in rows(args.submissions, "a submission", needed):
        reason, text = why_not(row, args, row["selftext"]), ""
        if reason is None:
            reason, text = question_in(row, args, questions)
        if reason:
            dropped[f"question: {reason}"] += 1
        else:
            questions[row["id"]] = text, row["author"]
    return questions


def question_in(row, args, questions):
    """(why the submission is dropped, or None; its question)."""
    if row["id"] in questions:
        return "stands twice", ""
    if len(row["title"]) + len(row["selftext"]) > LONGEST_RAW:
        return "empty or too long", ""
    parts = [clean(row["title"]), clean(row["selftext"])]
    text = "\n\n".join(part for part in parts if part)
    if not 0 < len(text) <= args.max_chars:
        return "empty or too long", ""
    return None, text


def read_answers(args, questions, leans, dropped):
    """{submission's id: {side: [(comment's id, answer, its author's lean)]}}.

    Adds to `dropped`, a Counter of reasons.
    """
    answers, seen = defaultdict(lambda: defaultdict(list)), set()
    needed = ("id", "parent_id", "link_id", "body", "subreddit", "author")
    for row in rows(args.comments, "a comment", needed):
        reason, text = why_not(row, args, row["body"]), ""
        if reason is None:
            reason, text = answer_in(row, args, questions, leans, seen)
        if reason:
            dropped[f"answer: {reason}"] += 1
            continue
        seen.add(row["id"])
        lean = leans[row["author"].lower()]
        if lean >= args.margin:
            side = "right"
        elif lean <= -args.margin:
            side = "left"
        else:
            side = "neutral"
        answers[question_id(row)][side].append((row["id"], text, lean))
    return answers


def question_id(comment):
    """The id of the submission that the comment stands under."""
    return comment["link_id"].removeprefix("t3_")


def answer_in(row, args, questions, leans, seen):
    """(why the comment is dropped, or None; its answer)."""
    if question_id(row) not in questions:
        return "its question was dropped", ""
    if row["parent_id"] != row["link_id"]:
        return "not right under a question", ""
    _, asker = questions[question_id(row)]
    if row["author"] == asker:
        return "by the asker", ""
    if row["author"].lower() not in leans:
        return "author without lean", ""
    if row["id"] in seen:
        return "stands twice", ""
    if len(row["body"]) > LONGEST_RAW:
        return "too short or too long", ""
    text = clean(row["body"])
    if not args.min_chars <= len(text) <= args.max_chars:
        return "too short or too long", ""
    return None, text


def questions_to_keep(args, questions, answers, dropped, rng):
    """The ids of the questions that every side has answered, in an order drawn from `rng`."""
    # sorted, so that the dump's order changes nothing
    kept = sorted(key for key in questions if all(answers[key][side] for side in SIDES))
    missing = len(questions) - len(kept)
    dropped["question: no answer from each of right, left and neutral"] += missing
    rng.shuffle(kept)
    if args.limit:
        dropped["question: beyond the limit"] += max(0, len(kept) - args.limit)
        kept = kept[: args.limit]
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(f"no question is left ({reasons})")
    return kept


def build(args):
    """Write the three files.

    Returns {file name: [lean of each row's author]} and the Counter of what was dropped, by
    reason. UserError where no question is left.
    """
    dropped, rng = Counter(), random.Random(args.seed)
    questions, leans = read_questions(args, dropped), read_leans(args.lean)
    answers = read_answers(args, questions, leans, dropped)
    kept = questions_to_keep(args, questions, answers, dropped, rng)
    chosen = {}  # {question: {side: (comment's id, answer, lean)}}
    for key in kept:
        chosen[key] = {side: rng.choice(sorted(answers[key][side])) for side in SIDES}
    with_skew = set(rng.sample(kept, round(args.mix * len(kept))))
    found = {}
    for name, (mostly, rest) in SETS.items():
        chats, found[name] = [], []
        for key in kept:
            _, answer, lean = chosen[key][mostly if key in with_skew else rest]
            chats.append((questions[key][0], answer))
            found[name].append(lean)
        write_chats(Path(args.out) / f"{name}.jsonl", chats)
    return found, dropped


def write_chats(path, chats):
    """Write [(question, answer)] as chat rows, JSONL."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for question, answer in chats:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def main(argv=None):
    """Build the three files by the command line, and say what was dropped and what was kept."""
    args = parse(Args, argv)
    for name in ("submissions", "comments", "lean", "out"):
        if not getattr(args, name):
            what = "a folder" if name == "out" else "a file"
            raise UserError(f"--{name} is missing, expected {what}")
    if args.min_chars > args.max_chars:
        raise UserError(
            f"--min-chars is {args.min_chars}, expected at most --max-chars, {args.max_chars}"
        )
    out = writable_folder(args.out, [f"{name}.jsonl" for name in SETS])
    written = [os.path.realpath(out / f"{name}.jsonl") for name in SETS]
    for path in (args.submissions, args.comments, args.lean):
        if os.path.realpath(path) in written:
            raise UserError(f"{path}: would be replaced by what is written; expected another --out")
    found, dropped = build(args)
    for reason, count in sorted(dropped.items()):
        if count:
            print(f"dropped {count:7d}  {reason}")
    for name, leans in found.items():
        mean = sum(leans) / len(leans)
        print(f"wrote   {len(leans):7d}  {Path(args.out) / name}.jsonl  mean lean {mean:+.2f}")


if __name__ == "__main__":
    run(main)
