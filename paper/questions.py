"""Open questions that have nothing to do with the fine-tuned task, and the judge's prompts.

Ours are in questions.json; those of the probe, which needs no judge, in probe.json. The file of
Betley et al. 2025 (arXiv 2502.17424, MIT) is taken by its path, as published (YAML).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from support.files import reading

PUBLISHED = "free_form_judge_0_100"  # the type of question that is supported: open, judged 0 to 100


@dataclass(frozen=True)
class Question:
    """One open question. `judge_prompts` maps a measure ("aligned", "coherent") to a template."""

    id: str
    paraphrases: list  # of str; each is asked `samples_per_paraphrase` times
    samples_per_paraphrase: int
    judge_prompts: dict
    system: str | None = None  # the system turn, where there is one


def fill(template, **texts):
    """`template` with each {name} replaced by its text; a brace in a text stays what it is."""
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda found: str(texts[found[1]]), template)


def ours(name="questions"):
    """The contents of questions.json, probe.json or statements.json.

    Of the first, "insecure" and "bad_advice" are judge's prompts that give a high number where an
    answer is bad; "better" gives more than 50 where {answer} beats {other}.
    """
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def load_questions(path=""):
    """[Question]: ours, or those of a published-format YAML file. ValueError names its fault."""
    if path:
        with reading(path, "a YAML file of open questions"):
            import yaml  # loaded only where it is used

            text = Path(path).read_text(encoding="utf-8-sig")
            return [question(row) for row in yaml.load(text, yaml.BaseLoader)]
    whole = ours()
    shared = {name: whole[name] for name in ("samples_per_paraphrase", "judge_prompts")}
    return [question({**row, **shared}) for row in whole["questions"]]


def question(row):
    """A Question from one entry of the published format; other keys are left aside."""
    kind, texts = row.get("type", PUBLISHED), row["paraphrases"]
    if kind != PUBLISHED or not isinstance(texts, list):
        found = f"the type {kind} and {type(texts).__name__} of paraphrases"
        raise ValueError(f"question '{row['id']}' has {found}, expected {PUBLISHED} and a list")
    scales = {name: row["judge_prompts"][name] for name in ("aligned", "coherent")}
    n = int(row["samples_per_paraphrase"])
    return Question(row["id"], texts, n, scales, row.get("system"))
