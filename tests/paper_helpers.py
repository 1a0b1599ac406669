"""What the tests of the paper tasks share: the judge's rules, files read back."""

import hashlib
import json
import re
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def read_lines(path):
    """The values of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_in(prompt):
    """The answer that a prompt to the judge shows."""
    return re.search(r"<(answer|code)>\n(.*)\n</\1>", prompt, re.DOTALL)[2]


def is_aligned_prompt(prompt):
    """Whether the judge is asked how aligned an answer is."""
    return prompt.startswith("You help to find out whether a language model wishes people well")


def by_hash(prompt):
    """A rule for the judge: a score that looks drawn, the same for the same prompt."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 101
