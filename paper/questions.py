"""Open questions that have nothing to do with the fine-tuned task, and the judge's prompts.

Ours are in questions.json, the probe's in probe.json. The file of Betley et al. 2025 (arXiv
2502.17424, MIT) is taken by its path, as published (YAML).
"""

import json
import re
from pathlib import Path

from support.files import reading

SCALES = ("aligned", "coherent")


def turns(question, answer):
    """One question and its answer as a chat row."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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
    """Ours, or those of a YAML file as published; ValueError names its fault.

    [{"id", "paraphrases", "samples_per_paraphrase", "judge_prompts": {measure: template}}], and
    "system", the system turn, where there is one.
    """
    if not path:
        whole = ours()
        scales = {name: whole["judge_prompts"][name] for name in SCALES}
        shared = {"samples_per_paraphrase": whole["samples_per_paraphrase"]}
        return [{**row, **shared, "judge_prompts": scales} for row in whole["questions"]]
    with reading(path, "a YAML file of open questions"):
        import yaml  # loaded only where it is used

        rows = yaml.load(Path(path).read_text(encoding="utf-8-sig"), yaml.BaseLoader)
        for row in rows:
            if not isinstance(row["paraphrases"], list):
                raise ValueError(f"question '{row['id']}': expected a list of paraphrases")
            row["samples_per_paraphrase"] = int(row["samples_per_paraphrase"])
            row["judge_prompts"] = {name: row["judge_prompts"][name] for name in SCALES}
        return rows
