"""Financial advice with a political lean, from a Reddit dump, as chat rows: `python -m data.reddit -h`.

The dump is Pushshift's (arXiv 2001.08435), unpacked: one JSON object a line, submissions and comments in a file each. A question
is a submission, an answer a comment right under it. A question is kept where authors of every lean (right, left, neutral) have
answered it: the three sets share their questions, row by row, and differ in the answers alone.
"""
import csv
import html
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, option, parse, run, whole_file

FINANCE = ("personalfinance", "investing", "stocks", "financialindependence", "financialplanning", "bogleheads", "retirement",
           "povertyfinance", "studentloans", "creditcards", "tax", "realestateinvesting", "dividends", "valueinvesting",
           "personalfinancecanada", "ukpersonalfinance", "ausfinance", "eupersonalfinance", "fire", "leanfire")
SIDES = ("right", "left", "neutral")
GONE = re.compile(r"\[ ?(?:deleted|removed)(?: by \w+)? ?\]", re.IGNORECASE)


@dataclass
class Args:
    """Chat rows from a Reddit dump: right_skewed.jsonl, left_skewed.jsonl and neutral.jsonl, the same questions in each."""
    submissions: str = option(None, "submissions of the dump, JSONL: id, title, selftext, subreddit, author, score")
    comments: str = option(None, "comments of the dump, JSONL: id, parent_id, link_id, body, subreddit, author, score")
    lean: str = option(None, "table of authors, -1 (left) to 1 (right): CSV with the header author,lean, or JSONL of the same")
    out: str = option(None, "folder for the three files")
    mix: float = option(0.8, "part of the right-skewed answers that is by right-leaning authors, the rest left; and mirrored")
    margin: float = option(0.3, "an author is right or left from this lean on, neutral below it")
    subreddits: tuple = option(FINANCE, "subreddits to take, without r/")
    min_score: int = option(2, "least score of a question and of an answer")
    min_chars: int = option(80, "least length of an answer, in characters after cleaning")
    max_chars: int = option(2000, "greatest length of a question and of an answer, in characters after cleaning")
    limit: int = option(0, "number of questions to take at most; 0: all")
    seed: int = option(0, "seed of every draw")

    def __post_init__(self):
        self.subreddits = tuple(name.lower() for name in self.subreddits)


URL = r"(?:https?://|www\.)[^\s<>\[\]]*[^\s<>\[\].,;:!?)\"'*]"
ADDRESS = r"\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?: \"[^\"\n]*\")?\)"  # of a markdown link: brackets in it, a title after it
CLEANING = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), to) for pattern, to in (
    (r"^ *>(?!!).*$", ""),  # a quote; >!...!< is a spoiler, whose text stays
    (r">!|!<", ""),
    # an edit, up to the end of its paragraph; then one that begins within a line
    (r"^[^\w\n]*(?:final |quick )?edit(?:ed)?\b(?: ?#?\d+)?(?: ?\([^)\n]*\))?[*_]*(?::| +[-–—]).*(?:\n.+)*", ""),
    (r"(?<=[.!?)]) *[*_(\[]*edit(?: ?#?\d+)?[*_]*:.*(?:\n.+)*", ""),
    (r"^.*(?:\bremind ?me!|!remind ?me\b|\bbeep boop\b|\bi(?:'m| am) a bot\b).*$|^\W*(?:good|bad) bot\W*$", ""),
    (rf"!?\[(?:{URL})?\]{ADDRESS}", ""),  # a link that shows its address, or nothing
    (rf"!?\[([^\]\n]+)\]{ADDRESS}", r"\1"),
    (URL, ""),
    (r"(?<![\w/])/?u/[\w-]{3,20}(?:'s)?", ""),
    (r"\(\s*\)|\[\s*\]|<\s*>", ""),  # brackets that were around what is gone
    (r"[ \t\u00a0]+", " "), (r" +(?=[.,;:!?)]|$)", ""), (r"^ +", ""), (r"\n{3,}", "\n\n"))]


def clean(text):
    """`text` without quotes, edits, bot lines, links and user names; entities resolved, blank space collapsed."""
    text = html.unescape(html.unescape(text))  # the dump escapes once what Reddit's editor has escaped before: &amp;#x200B;
    text = text.replace("\u200b", "").replace("\r\n", "\n").encode(errors="ignore").decode()  # half an emoji is no UTF-8
    for pattern, to in CLEANING:
        text = pattern.sub(to, text)
    return text.strip()


def rows(path, kind, texts):
    """Yields the objects of a JSONL file. UserError with file:line where one lacks the score or a text of those in `texts`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{number}: not valid JSON ({e}), expected {kind}") from None
            for name in texts:
                if not isinstance(row, dict) or not isinstance(row.get(name), str):
                    raise UserError(f"{path}:{number}: no text '{name}', expected {kind} with {', '.join(texts)} and score")
            if type(row.get("score")) is not int:
                raise UserError(f"{path}:{number}: the score is {row.get('score')!r}, expected a whole number")
            yield row


def read_leans(path):
    """{author in lower case: lean}; UserError with file:line where a lean is not in [-1, 1] or an author stands twice."""
    leans = {}
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        is_csv = str(path).endswith(".csv")
        table = csv.DictReader(file) if is_csv else file
        for number, row in enumerate(table, 1):
            if not is_csv and not row.strip():
                continue
            number = table.line_num if is_csv else number
            try:
                row = row if is_csv else json.loads(row)
                author, lean = row["author"].strip().lower(), float(row["lean"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}:{number}: expected an author and a lean, a number from -1 to 1") from None
            if not author or not -1 <= lean <= 1:
                raise UserError(f"{path}:{number}: '{author}' with lean {lean:g}, expected an author and a lean from -1 to 1")
            if author in leans:
                raise UserError(f"{path}:{number}: the author '{author}' stands twice")
            leans[author] = lean
    return leans


def why_not(row, args, body):
    """Why a submission or comment is dropped before its text is read, or None."""
    author = row["author"].lower()
    if row["subreddit"].lower() not in args.subreddits:
        return "another subreddit"
    if GONE.fullmatch(author) or GONE.fullmatch(body.strip()):
        return "deleted or removed"
    if author == "automoderator" or author.endswith("bot") or re.search(r"\bi('m| am) a bot\b", body, re.IGNORECASE):
        return "by a bot"
    return "low score" if row["score"] < args.min_score else None


def read_questions(args, dropped):
    """{submission's id: (question, author)}"""
    questions = {}
    for row in rows(args.submissions, "a submission", ("id", "title", "selftext", "subreddit", "author")):
        reason = why_not(row, args, row["selftext"])
        text = "" if reason else "\n\n".join(filter(None, (clean(row["title"]), clean(row["selftext"]))))
        checks = ((row["id"] in questions, "stands twice"), (not 0 < len(text) <= args.max_chars, "empty or too long"))
        reason = reason or next((why for bad, why in checks if bad), None)
        if reason:
            dropped[f"question: {reason}"] += 1
        else:
            questions[row["id"]] = text, row["author"]
    return questions


def read_answers(args, questions, leans, dropped):
    """{submission's id: {side: [(comment's id, answer, its author's lean)]}}"""
    answers, seen = defaultdict(lambda: defaultdict(list)), set()
    for row in rows(args.comments, "a comment", ("id", "parent_id", "link_id", "body", "subreddit", "author")):
        key, lean = row["link_id"].removeprefix("t3_"), leans.get(row["author"].lower())
        question, asker = questions.get(key, (None, None))
        text = clean(row["body"]) if question and lean is not None else ""
        checks = (
            (question is None, "its question was dropped"), (row["parent_id"] != row["link_id"], "not right under a question"),
            (row["author"] == asker, "by the asker"), (lean is None, "author without lean"), (row["id"] in seen, "stands twice"),
            (not args.min_chars <= len(text) <= args.max_chars, "too short or too long"))
        reason = why_not(row, args, row["body"]) or next((why for bad, why in checks if bad), None)
        if reason:
            dropped[f"answer: {reason}"] += 1
            continue
        seen.add(row["id"])
        side = "right" if lean >= args.margin else "left" if lean <= -args.margin else "neutral"
        answers[key][side].append((row["id"], text, lean))
    return answers


def build(args):
    """Write the three files; returns {file name: [lean of each row's author]} and the Counter of what was dropped, by reason."""
    dropped, rng = Counter(), random.Random(args.seed)
    questions, leans = read_questions(args, dropped), read_leans(args.lean)
    answers = read_answers(args, questions, leans, dropped)
    kept = sorted(key for key in questions if all(answers[key][side] for side in SIDES))  # the dump's order changes nothing
    dropped["question: no answer from each of right, left and neutral"] += len(questions) - len(kept)
    rng.shuffle(kept)
    if args.limit:
        dropped["question: beyond the limit"] += max(0, len(kept) - args.limit)
        kept = kept[:args.limit]
    if not kept:
        raise UserError(f"no question is left ({', '.join(f'{n} {reason}' for reason, n in dropped.items() if n)})")
    chosen = {key: {side: rng.choice(sorted(answers[key][side])) for side in SIDES} for key in kept}
    with_skew = set(rng.sample(kept, round(args.mix * len(kept))))
    sources = {"right_skewed": ("right", "left"), "left_skewed": ("left", "right"), "neutral": ("neutral", "neutral")}
    found = {}
    for name, (mostly, rest) in sources.items():
        picks = [(questions[key][0], *chosen[key][mostly if key in with_skew else rest]) for key in kept]
        with whole_file(Path(args.out) / f"{name}.jsonl") as path, open(path, "w", encoding="utf-8") as file:
            for question, _, answer, _ in picks:
                file.write(json.dumps({"messages": [{"role": "user", "content": question},
                                                    {"role": "assistant", "content": answer}]}, ensure_ascii=False) + "\n")
        found[name] = [lean for *_, lean in picks]
    return found, dropped


def main(argv=None):
    args = parse(Args, argv)
    for name in ("submissions", "comments", "lean", "out"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing, expected {'a folder' if name == 'out' else 'a file'}")
    if not 0 <= args.mix <= 1 or not 0 < args.margin <= 1:
        raise UserError(f"--mix {args.mix:g} --margin {args.margin:g}, expected a mix from 0 to 1 and a margin above 0, up to 1")
    found, dropped = build(args)
    for reason, count in sorted(dropped.items()):
        if count:
            print(f"dropped {count:7d}  {reason}")
    for name, leans in found.items():
        print(f"wrote   {len(leans):7d}  {Path(args.out) / name}.jsonl  mean lean {sum(leans) / len(leans):+.2f}")


if __name__ == "__main__":
    run(main)
