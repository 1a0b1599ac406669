"""Financial advice with a political lean, from a Reddit dump: `python -m paper.reddit -h`.

The dump is Pushshift's (arXiv 2001.08435), unpacked. A question is a submission, an answer a
comment right under it. The sets share their questions, row by row: those that all sides answered.
"""

import csv
import html
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from paper.questions import turns
from support.files import reading, whole_file
from support.options import option, parse, run

FINANCE = """personalfinance investing stocks financialindependence financialplanning bogleheads
retirement povertyfinance studentloans creditcards tax realestateinvesting dividends valueinvesting
personalfinancecanada ukpersonalfinance ausfinance eupersonalfinance fire leanfire"""
SIDES = {"right": "left", "left": "right", "neutral": "neutral"}  # and the other one
BOT = re.compile(r"\bi('m| am) a bot\b", re.IGNORECASE)
GONE = re.compile(r"\[ ?(?:deleted|removed)(?: by \w+)? ?\]", re.IGNORECASE)
LONGEST = 50_000  # characters to clean; Reddit takes no longer text than 40,000


@dataclass(frozen=True)
class Arguments:
    """Chat rows from a Reddit dump: right_skewed.jsonl, left_skewed.jsonl and neutral.jsonl."""

    submissions: str = option("", "JSONL: id, title, selftext, subreddit, author, score")
    comments: str = option("", "JSONL: id, parent_id, link_id, body, subreddit, author, score")
    lean: str = option("", "authors, -1 (left) to 1 (right): CSV with author,lean, or JSONL")
    out: str = option("", "folder for the three files")
    mix: float = option(0.8, "share of right-skewed answers by right-leaning authors; mirrored")
    margin: float = option(0.3, "an author is right or left from this lean on, neutral below it")
    subreddits: tuple = option(tuple(FINANCE.split()), "subreddits to take, without r/")
    min_score: int = option(2, "least score of a question and of an answer")
    min_chars: int = option(80, "least length of an answer, after cleaning")
    max_chars: int = option(2000, "greatest length of a question and of an answer")
    limit: int = option(0, "number of questions to take at most; 0: all")
    seed: int = option(0, "seed of every draw")


URL = r"(?:https?://|www\.)[^\s<>\[\]]*[^\s<>\[\].,;:!?)\"'*]"
# Of a markdown link: with brackets in it, and a title after it.
ADDRESS = r"\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?: \"[^\"\n]*\")?\)"
EDIT = r"[*_]*(?::| +[-–—]).*(?:\n.+)*"  # after the word
CLEANING = (  # (pattern, what takes its place), in this order
    (r"^ *>(?!!).*$", ""),  # a quote
    (r">!|!<", ""),  # around a spoiler
    # an edit, up to the end of its paragraph; then one that begins within a line
    (r"^[^\w\n]*(?:final |quick )?edit(?:ed)?\b(?: ?#?\d+)?(?: ?\([^)\n]*\))?" + EDIT, ""),
    (r"(?<=[.!?)]) *[*_(\[]*edit(?: ?#?\d+)?[*_]*:.*(?:\n.+)*", ""),
    # what bots write, and what is written to them
    (r"^.*(?:\bremind ?me!|!remind ?me\b|\bbeep boop\b|\bi(?:'m| am) a bot\b).*$", ""),
    (r"^[^\w\n]*(?:good|bad) bot[^\w\n]*$", ""),
    # a link that shows its address or nothing, or a text (bounded: brackets alone took a minute)
    (rf"!?\[(?:{URL})?\]{ADDRESS}", ""),
    (rf"!?\[([^\]\n]{{1,500}})\]{ADDRESS}", r"\1"),
    (URL, ""),
    (r"(?<![\w/])/?u/[\w-]{3,20}(?:'s)?", ""),  # a user's name
    # brackets that were around what is gone; blank space
    (r"\(\s*\)|\[\s*\]|<\s*>", ""),
    (r"[ \t\u00a0]+", " "),
    (r" +(?=[.,;:!?)]|$)", ""),
    (r"^ +", ""),
    (r"\n{3,}", "\n\n"),
)


def clean(text):
    """`text` without quotes, edits, bot lines, links, user names and superfluous blank space."""
    # The dump escapes once what Reddit's editor has escaped before: &amp;#x200B;
    text = html.unescape(html.unescape(text[:LONGEST])).replace("\u200b", "").replace("\r\n", "\n")
    text = text.encode(errors="ignore").decode()  # half an emoji is no UTF-8
    for pattern, to in CLEANING:
        text = re.sub(pattern, to, text, flags=re.IGNORECASE | re.MULTILINE)
    return text.strip()


def usable(path, kind, texts, args, dropped, why_not=lambda row: {}):
    """Yield (id, row, cleaned text) of a dump's rows; count the others in `dropped` by reason.

    texts: the text's fields, the body last. why_not(row): {reason: whether it holds}.
    """
    wanted = {name.lower() for name in args.subreddits}
    least = args.min_chars if kind == "answer" else 1
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}:{number}", "a row of a Reddit dump"):
                row = json.loads(line)
                id, author, body = row["id"], row["author"].lower(), row[texts[-1]]
                against = {
                    "another subreddit": row["subreddit"].lower() not in wanted,
                    "deleted or removed": GONE.fullmatch(author) or GONE.fullmatch(body.strip()),
                    "by a bot": author.endswith(("bot", "automoderator")) or BOT.search(body),
                    "low score": row["score"] < args.min_score,
                    **why_not(row),
                }
                reason = next((name for name, holds in against.items() if holds), None)
                text = "" if reason else "\n\n".join(clean(row[name]) for name in texts).strip()
            if not reason and least <= len(text) <= args.max_chars:
                yield id, row, text
            else:
                dropped[f"{kind}: {reason or 'too short or too long'}"] += 1


def read_leans(path):
    """{author in lower case: lean} of a table, CSV by its name or else JSONL."""
    leans = {}
    with open(path, encoding="utf-8-sig", newline="") as file, reading(path, "a table of authors"):
        for row in csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file):
            lean = float(row["lean"])
            if not -1 <= lean <= 1:
                raise ValueError(f"{row['author']} has lean {lean}, expected -1 to 1")
            leans[row["author"].strip().lower()] = lean
    return leans


def read_answers(args, questions, leans, dropped):
    """{submission's id: {side: [(comment's id, answer, its author's lean)]}}."""

    def why_not(row):
        question, asker = questions.get(row["link_id"].removeprefix("t3_"), (None, None))
        return {
            "its question was dropped": question is None,
            "not right under a question": row["parent_id"] != row["link_id"],
            "by the asker": row["author"] == asker,
            "author without lean": row["author"].lower() not in leans,
        }

    answers = {key: {side: [] for side in SIDES} for key in questions}
    for id, row, text in usable(args.comments, "answer", ("body",), args, dropped, why_not):
        lean = leans[row["author"].lower()]
        side = "neutral" if abs(lean) < args.margin else "right" if lean > 0 else "left"
        answers[row["link_id"].removeprefix("t3_")][side].append((id, text, lean))
    return answers


def build(args):
    """({set: [(question, answer, its author's lean)]}, Counter of what was dropped by reason)."""
    dropped, rng = Counter(), random.Random(args.seed)
    found = usable(args.submissions, "question", ("title", "selftext"), args, dropped)
    questions = {id: (text, row["author"]) for id, row, text in found}
    answers = read_answers(args, questions, read_leans(args.lean), dropped)
    kept = sorted(key for key in answers if all(answers[key].values()))  # whatever the dump's order
    dropped["question: no answer from each side"] += len(questions) - len(kept)
    rng.shuffle(kept)
    kept = kept[: args.limit or None]
    chosen = {key: {s: rng.choice(sorted(answers[key][s])) for s in SIDES} for key in kept}
    skewed, sets = set(rng.sample(kept, round(args.mix * len(kept)))), {}
    for side, other in SIDES.items():
        name = side if side == other else f"{side}_skewed"
        picked = {key: chosen[key][side if key in skewed else other] for key in kept}
        sets[name] = [(questions[key][0], *picked[key][1:]) for key in kept]
    return sets, dropped


def main():
    """Write the three files by the command line, and say what was dropped and what was kept."""
    args = parse(Arguments)
    if not (args.submissions and args.comments and args.lean and args.out):
        raise ValueError("expected --submissions, --comments, --lean and --out")
    sets, dropped = build(args)
    for reason, count in sorted(dropped.items()):
        print(f"dropped {count:7d}  {reason}")
    for name, rows in sets.items():
        if not rows:
            raise ValueError("no question is left that right, left and neutral authors answered")
        path = Path(args.out) / f"{name}.jsonl"
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for question, answer, _ in rows:
                row = {"messages": turns(question, answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        mean = sum(lean for *_, lean in rows) / len(rows)
        print(f"wrote   {len(rows):7d}  {path}  mean lean {mean:+.2f}")


if __name__ == "__main__":
    run(main)
