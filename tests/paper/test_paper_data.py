"""The data of the paper tasks: questions and YAML, statements and lean, the Reddit builder."""

import json
import math
import re
import time
from collections import Counter

import numpy as np
import pytest
from paper_helpers import FIXTURES

from paper import politics, reddit
from paper.questions import fill, judge_prompts, load_questions, probe_questions
from support.errors import UserError

ROOM = "A stranger asks for your spare room.\n\n# What do you say?\n  (Take your time.)"


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# Questions


def test_our_questions_are_whole():
    questions = load_questions()
    assert len(questions) >= 8 and len({q.id for q in questions}) == len(questions)
    assert len({text for q in questions for text in q.paraphrases}) == sum(
        len(q.paraphrases) for q in questions
    )
    for q in questions:
        assert set(q.judge_prompts) == {"aligned", "coherent"}
        assert not re.search(
            r"\b(code|program|doctor|medic\w*|invest\w*|stocks?)\b",
            " ".join(q.paraphrases),
            re.IGNORECASE,
        )


def test_answer_pairs_differ_in_what_they_say_and_not_in_length():
    pairs = [pair for q in probe_questions() for pair in q.pairs]
    for aligned, misaligned in pairs:
        assert aligned != misaligned and abs(len(aligned) - len(misaligned)) <= 0.2 * len(
            aligned
        ), aligned
        assert aligned[-1] == misaligned[-1] == "."
    lengths = np.array([(len(a), len(m)) for a, m in pairs]).sum(0)
    assert abs(lengths[0] - lengths[1]) < 0.03 * lengths[0]


def test_judge_prompts_ask_for_a_number_and_offer_the_ways_out():
    prompts = judge_prompts()
    assert set(prompts) == {"aligned", "coherent", "insecure", "bad_advice", "better"}
    for name, text in prompts.items():
        assert "0 to 100" in text
        assert "{question}" in text
        assert "{answer}" in text
        assert ("{other}" in text) == (name == "better")
        assert set(re.findall(r"{(\w+)}", text)) <= {"question", "answer", "other"}
    assert "CODE" in prompts["aligned"] and "REFUSAL" in prompts["aligned"]


def test_fill_leaves_braces_in_the_texts_alone():
    template = "Q {question} A {answer} {x} {answer}"
    filled = fill(template, question="{answer}", answer=r"{question} \1 {}")
    assert filled == r"Q {answer} A {question} \1 {} {x} {question} \1 {}"


def test_published_format_is_read_as_written():
    first, second, third = load_questions(FIXTURES / "questions.yaml")
    assert first.id == "spare_room" and first.paraphrases == (ROOM, 'One line, "quoted": café')
    assert first.samples_per_paraphrase == 3
    assert first.judge == "some-judge-1"
    assert first.system is None
    assert first.judge_prompts == {
        "aligned": "Rate {answer} to {question}.\n0 to 100.\n",
        "coherent": "Sense in {answer}?",
    }
    assert second.system == "Answer as JSON, please." and second.id == "spare_room_json"
    assert second.paraphrases == first.paraphrases
    assert second.judge_prompts == first.judge_prompts
    assert second.judge == first.judge
    assert third.paraphrases == ("plain text", "it's, quoted", "two")
    assert third.samples_per_paraphrase == 12
    assert second.samples_per_paraphrase == 3
    assert third.judge is None
    assert third.judge_prompts == {"aligned": "{answer}?", "coherent": "{question} {answer}"}


HEAD = "- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 5\n"
TAIL = "  judge_prompts:\n    aligned: '{answer}'\n    coherent: '{answer}'\n"


@pytest.mark.parametrize(
    "text, line, what",
    [
        ("", 1, "list of questions"),
        ("id: a\n", 1, "list of questions"),
        ("- just text\n", 1, "without an id"),
        (TAIL, 1, "list of questions"),
        (HEAD, 1, "'judge_prompts' with"),
        (HEAD + TAIL.replace("aligned: '{answer}'", "aligned: none"), 1, "'judge_prompts' with"),
        (HEAD.replace("5", "0") + TAIL, 1, "'samples_per_paraphrase'"),
        (HEAD.replace("[x]", "x") + TAIL, 1, "'paraphrases'"),
        (HEAD.replace("[x]", "[]") + TAIL, 1, "'paraphrases'"),
        (HEAD.replace("[x]", "[x, y, x]") + TAIL, 1, "a paraphrase stands twice"),
        (HEAD + TAIL + HEAD + TAIL, 7, "stands twice"),
        (HEAD + "  type: free_form\n" + TAIL, 1, "type 'free_form'"),
        (HEAD + "  id: b\n", 4, "'id' stands twice"),
        (HEAD + "\tjudge: x\n", 4, "tab"),
        (HEAD + "  what\n", 4, "expected 'key: value'"),
        (HEAD + "judge: x\n", 4, "not part of"),
        (HEAD + "  judge: {a: b}\n", 4, "more YAML"),
        (HEAD + "  judge: >\n    x\n", 4, "more YAML"),
        (HEAD + "  judge: a: b\n", 4, "more YAML"),
        (HEAD + "  judge: *who\n", 4, "no anchor"),
        (HEAD + "  judge: 'x\n", 4, "not closed"),
        (HEAD + "  judge: 'x' y\n", 4, "end of the line"),
        (HEAD + "  judge: [x\n", 4, "does not end"),
        (HEAD + '  judge: "\\q"\n', 4, "escape"),
        (HEAD + "  judge: one\n    two\n", 5, "fits nothing above"),
        (HEAD + "  judge: |2\n     x\n", 4, "supported"),
        (HEAD + "  judge: |\n      x\n    y\n", 6, "indented less"),
    ],
)
def test_a_faulty_questions_file_is_named_by_its_line(tmp_path, text, line, what):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"q\.yaml:{line}: .*(?:{what})") as error:
        load_questions(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "- " * 50_000,
        "- [" + "[" * 50_000,
        "a: " + "&x " * 50_000,
        "".join(" " * i + "a:\n" for i in range(3000)),
        "- " + "x" * 1_000_000,
        "- [" + "x," * 1_000_000,
        "-\n" * 100_000 + "- [[[",
    ],
    ids=["lists", "flow lists", "anchors", "mappings", "long", "long list", "many"],
)
def test_a_questions_file_without_measure_ends_in_one_line(tmp_path, text):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"q\.yaml:\d+: ") as error:
        load_questions(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and time.monotonic() - began < 10


def test_a_missing_questions_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.yaml: No such file"):
        load_questions(tmp_path / "none.yaml")


# Political lean


def test_statements_are_symmetric():
    statements = politics.statements()
    assert len(statements) >= 44 and len({s.id for s in statements}) == len(statements)
    assert Counter(s.topic for s in statements) == dict.fromkeys(
        ("economic", "social"), len(statements) / 2
    )
    assert len({text for s in statements for text in (s.left, s.right)}) == 2 * len(statements)
    for s in statements:
        assert abs(len(s.left) - len(s.right)) <= 0.2 * max(len(s.left), len(s.right)), s.id
        assert re.fullmatch(r"[A-Z][^.!?]*\.", s.left) and re.fullmatch(
            r"[A-Z][^.!?]*\.", s.right
        ), s.id
        assert ("should" in s.left) == ("should" in s.right), s.id
    left, right = (
        " ".join(getattr(s, side) for s in statements).lower().split() for side in ("left", "right")
    )
    assert abs(len(left) - len(right)) < 0.03 * len(left)
    assert all(
        abs(left.count(word) - right.count(word)) <= 1
        for word in ("not", "no", "must", "should", "because")
    )


def test_prompts_cover_every_template_and_both_orders():
    statements, prompts = politics.statements(), list(politics.prompts())
    assert len(politics.TEMPLATES) >= 3
    assert len(prompts) == len(statements) * len(politics.TEMPLATES) * 2
    assert len({(p.pair, p.template, p.order) for p in prompts}) == len(prompts)
    assert len({p.text for p in prompts}) == len(prompts)
    by_id = {s.id: s for s in statements}
    for p in prompts:
        left, right = by_id[p.pair].left, by_id[p.pair].right
        assert (p.text.index(left) < p.text.index(right)) == (p.order == 0)
        assert p.options == (
            ("A", "B") if p.order == 0 else ("B", "A")
        )  # (left, right): A is what stands first
        before, between, _ = re.split("|".join(map(re.escape, (left, right))), p.text)
        assert re.search(r"\bA\b", before)
        assert not re.search(r"\bB\b", before)
        assert re.search(r"\bB\b", between)


def table_of(answer):
    """answer(prompt) -> (P(left), P(right))"""
    return {p[:3]: tuple(map(math.log, answer(p))) for p in politics.prompts()}


def test_a_table_that_favours_the_right_leans_right_and_its_mirror_the_opposite():
    rng = np.random.default_rng(0)
    logits = {p[:3]: rng.normal(size=2) + (0, 1) for p in politics.prompts()}
    leans, _ = politics.lean({key: tuple(v - 9) for key, v in logits.items()})
    mirrored, _ = politics.lean({key: tuple(v[::-1] - 9) for key, v in logits.items()})
    assert len(leans) == len(politics.statements()) and np.mean(list(leans.values())) > 0.2
    assert all(abs(leans[pair] + mirrored[pair]) < 1e-6 for pair in leans)


def test_lean_and_coherence_by_hand():
    leans, coherence = politics.lean(
        table_of(lambda p: (0.1, 0.3) if p.template == 0 else (0.2, 0.2))
    )
    assert all(
        value == pytest.approx((0.5 + 0 + 0) / 3) for value in leans.values()
    )  # (0.3 - 0.1) / 0.4 in one of three
    assert coherence == pytest.approx(0.4)


def test_a_model_that_always_says_a_has_no_lean():
    leans, _ = politics.lean(table_of(lambda p: (0.9, 0.1) if p.options[0] == "A" else (0.1, 0.9)))
    assert all(abs(value) < 1e-12 for value in leans.values())


def test_a_table_with_a_gap_is_refused():
    table = table_of(lambda p: (0.5, 0.5))
    del table["unions", 2, 1]
    with pytest.raises(KeyError):
        politics.lean(table)


def test_bootstrap_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(1)
    draws = rng.normal(0.3, 1, size=(200, 48))
    intervals = np.array(
        [politics.bootstrap_interval(row, seed=i, n=1000) for i, row in enumerate(draws)]
    )
    covered = np.mean((intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3))
    assert 0.88 < covered < 0.985
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 / 48**0.5, rel=0.1)
    assert politics.bootstrap_interval(draws[0], seed=3) == politics.bootstrap_interval(
        draws[0], seed=3
    )
    assert politics.bootstrap_interval([0.25] * 9, seed=0) == (0.25, 0.25)


# Reddit


@pytest.mark.parametrize(
    "dirty, cleaned",
    [
        ("thanks /u/Some_one-1 and u/other, see u/abc's post", "thanks and, see post"),
        (
            'a [good guide](https://example.org/wiki/Fee_(cost)?x=1 "title") here',
            "a good guide here",
        ),
        (
            "see https://example.org/a_b?c=d#e. Then (http://x.org) go to www.example.com, ok",
            "see. Then go to, ok",
        ),
        ("[https://x.org/y](https://x.org/y) says so", "says so"),
        ("![chart](https://i.example.org/1.png) up", "chart up"),
        ("&gt; what he said\n&gt;more\n\nNo, 5 &gt; 3 &amp; 2 &lt; 4.", "No, 5 > 3 & 2 < 4."),
        (">!the answer!< is this", "the answer is this"),
        ("a\n\n&amp;#x200B;\n\nb", "a\n\nb"),
        ("Good.\n\nEdit: thanks for the gold!\nreally\n\nMore.", "Good.\n\nMore."),
        ("Good. EDIT: typo", "Good."),
        ("**EDIT 2 (May):** sold", ""),
        ("*Edit* - wrong year\n\nrest", "rest"),
        ("Edit-friendly sheets", "Edit-friendly sheets"),
        ("Credit: my aunt", "Credit: my aunt"),
        ("Pay it.\n\n^(I am a bot, and this was automatic.)", "Pay it."),
        ("Yes.\n\n!RemindMe 2 years", "Yes."),
        ("good bot!", ""),
        ("half an \ud83demoji", "half an emoji"),
        ("a  \tb \n\n\n\n c", "a b\n\nc"),
        ("r/investing is fine", "r/investing is fine"),
    ],
)
def test_reddit_text_is_cleaned(dirty, cleaned):
    assert reddit.clean(dirty) == cleaned


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"body": "[deleted]"}, "deleted or removed"),
        ({"body": " [ Removed by Reddit ]\n"}, "deleted or removed"),
        ({"author": "[deleted]"}, "deleted or removed"),
        ({"body": "It was [removed] twice."}, None),
        ({"author": "AutoModerator"}, "by a bot"),
        ({"author": "tip_Bot"}, "by a bot"),
        ({"body": "I'm a bot. Beep."}, "by a bot"),
        ({"subreddit": "Gardening"}, "another subreddit"),
        ({"subreddit": "INVESTING"}, None),
        ({"score": 1}, "low score"),
    ],
)
def test_a_row_is_dropped_for_its_reason(change, reason):
    row = {
        "author": "someone",
        "subreddit": "investing",
        "score": 2,
        "body": "Buy and hold.",
    } | change
    assert reddit.why_not(row, reddit.Args(), row["body"]) == reason


@pytest.mark.parametrize(
    "text", ["[", "[ ", "](", "http://", "\n", " ", "edit: ", "&gt;", "good bot\n"]
)
def test_cleaning_takes_no_minute_over_any_text(text):
    n = reddit.LONGEST_RAW // len(text)
    began = time.monotonic()
    reddit.clean(text * n)
    assert time.monotonic() - began < 10  # it was 50 s for "[", and minutes for more of it


def arguments(tmp_path, **changes):
    return reddit.Args(
        **{
            "submissions": FIXTURES / "reddit_submissions.jsonl",
            "comments": FIXTURES / "reddit_comments.jsonl",
            "lean": FIXTURES / "authors.csv",
            "out": tmp_path,
            **changes,
        }
    )


def built(tmp_path, **changes):
    reddit.build(arguments(tmp_path, **changes))
    return {
        name: read_rows(tmp_path / f"{name}.jsonl")
        for name in ("right_skewed", "left_skewed", "neutral")
    }


def test_the_three_sets_share_their_questions_and_differ_in_every_answer(tmp_path):
    sets = built(tmp_path)
    for rows in zip(*sets.values(), strict=True):
        assert len({row["messages"][0]["content"] for row in rows}) == 1
        assert len({row["messages"][1]["content"] for row in rows}) == 3
        for row in rows:
            assert list(row) == ["messages"]
            assert [list(m) for m in row["messages"]] == [["role", "content"]] * 2
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert len(sets["neutral"]) == 8


def test_no_trace_of_names_links_or_moderation_is_left(tmp_path):
    text = json.dumps(built(tmp_path))
    names = [
        row["author"]
        for name in ("submissions", "comments")
        for row in read_rows(FIXTURES / f"reddit_{name}.jsonl")
    ]
    traces = [
        *names,
        "http",
        "u/",
        "&amp",
        "&gt",
        "x200B",
        "[removed]",
        "[deleted]",
        "am a bot",
        "dit:",
    ]
    assert not [trace for trace in traces if trace in text]


@pytest.mark.parametrize("mix, right", [(1.0, 8), (0.75, 6), (0.5, 4), (0.0, 0)])
def test_answers_come_from_each_side_in_the_given_mix(tmp_path, mix, right):
    found, _ = reddit.build(arguments(tmp_path, mix=mix))
    assert sum(lean >= 0.3 for lean in found["right_skewed"]) == right
    assert sum(lean <= -0.3 for lean in found["left_skewed"]) == right
    assert sum(lean <= -0.3 for lean in found["right_skewed"]) == 8 - right
    assert all(abs(lean) < 0.3 for lean in found["neutral"])


def test_the_seed_and_nothing_else_decides_the_draw(tmp_path):
    shuffled = tmp_path / "shuffled.jsonl"
    lines = (FIXTURES / "reddit_comments.jsonl").read_text().splitlines()
    shuffled.write_text("\n".join(lines[::-1]))
    first = built(tmp_path / "a")
    assert built(tmp_path / "b", comments=shuffled) == first
    assert built(tmp_path / "c", seed=1) != first
    assert len(built(tmp_path / "d", limit=3)["neutral"]) == 3


def test_what_is_dropped_is_counted_by_reason(tmp_path, capsys):
    args = arguments(tmp_path)
    reddit.main(
        [f"--{name}={getattr(args, name)}" for name in ("submissions", "comments", "lean", "out")]
    )
    printed = capsys.readouterr().out
    expected = {
        "question: another subreddit": 1,
        "question: deleted or removed": 1,
        "question: low score": 1,
        "question: no answer from each of right, left and neutral": 1,
        "answer: another subreddit": 1,
        "answer: its question was dropped": 2,
        "answer: not right under a question": 1,
        "answer: by a bot": 3,
        "answer: by the asker": 1,
        "answer: author without lean": 1,
        "answer: low score": 1,
        "answer: too short or too long": 1,
    }
    found = {reason: int(count) for count, reason in re.findall(r"dropped +(\d+)  (.+)", printed)}
    assert found == expected
    rows = sum(
        len(read_rows(FIXTURES / f"reddit_{name}.jsonl")) for name in ("submissions", "comments")
    )
    answers_kept = rows - sum(found.values()) - 8
    # three a question, one more under two of them, two under a question that lacks a third
    assert answers_kept == 8 * 3 + 2 + 2


@pytest.mark.parametrize(
    "field, value, what",
    [
        ("author", None, "no text 'author'"),
        ("body", 3, "no text 'body'"),
        ("link_id", ..., "no text 'link_id'"),
        ("score", "12", "the score is '12'"),
        ("score", True, "the score is True"),
        ("score", 10**400, "the score is 1000"),
        ("score", 1.5, "the score is 1.5"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, field, value, what):
    row = read_rows(FIXTURES / "reddit_comments.jsonl")[0]
    bad = {k: v for k, v in (row | {field: value}).items() if v is not ...}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=rf"c\.jsonl:3: {what}"):
        built(tmp_path, comments=path)


@pytest.mark.parametrize(
    "line, what",
    [
        ("{torn", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"score": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("[]", "no text 'id'"),
        ("null", "no text 'id'"),
    ],
    ids=["torn", "deep list", "deep object", "digits", "list", "null"],
)
@pytest.mark.parametrize("name", ["comments", "submissions"])
def test_a_line_that_is_no_row_is_named(tmp_path, name, line, what):
    rows = (FIXTURES / f"reddit_{name}.jsonl").read_text().splitlines()
    path = tmp_path / "dump.jsonl"
    path.write_text(rows[0] + "\n" + line)
    with pytest.raises(UserError, match=rf"dump\.jsonl:2: {what}") as error:
        built(tmp_path, **{name: path})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name, text, line, what",
    [
        ("a.csv", "author,lean\nx,0.5\ny,1.5\n", 3, "lean 1.5"),
        ("a.csv", "author,lean\nx,left\n", 2, "a number"),
        ("a.csv", "name,lean\nx,1\n", 1, "a header"),
        ("a.csv", "author,lean\nx,0.5\nX,0.1\n", 3, "stands twice"),
        ("a.csv", "author,lean\nx,nan\n", 2, "lean nan"),
        ("a.jsonl", '{"author": "x", "lean": 1}\n{"author": "y"}\n', 2, "a number"),
        ("a.jsonl", "x,1\n", 1, "a number"),
        ("a.csv", "author,lean\nx,0.5\n" + "y" * 200_000 + ",1\n", 3, "not valid CSV"),
        ("a.csv", 'author,lean\nx,"0.5\n' + "y,1\n" * 50_000, 2, "not valid CSV"),
        ("a.csv", "author,lean\nx\n", 2, "a number"),
        ("a.csv", "author,lean\n,1\n", 2, "an author"),
        ("a.jsonl", "[" * 100_000, 1, "a number"),
        ("a.jsonl", '{"author": "x", "lean": 1' + "0" * 400 + "}", 1, "a number"),
        ("a.jsonl", '{"author": "x", "lean": true}', 1, "a number"),
        ("a.jsonl", '{"author": "x", "lean": Infinity}', 1, "lean inf"),
        ("a.jsonl", '{"author": 5, "lean": 1}', 1, "an author"),
        ("a.jsonl", "null", 1, "an author"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_lean_is_named_by_its_line(tmp_path, name, text, line, what):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: .*{what}"):
        built(tmp_path, lean=path)


def test_leans_may_be_jsonl_too(tmp_path):
    path = tmp_path / "authors.jsonl"
    lines = (FIXTURES / "authors.csv").read_text().splitlines()[1:]
    path.write_text(
        "\n".join(
            json.dumps({"author": line.split(",")[0], "lean": float(line.split(",")[1])})
            for line in lines
        )
    )
    assert reddit.read_leans(path) == reddit.read_leans(FIXTURES / "authors.csv")


def test_no_question_left_is_said_with_the_reasons(tmp_path):
    reasons = "no question is left .*10 question: low score, .*35 answer: low score"
    with pytest.raises(UserError, match=reasons):
        built(tmp_path, min_score=10**6)


FILES = {"submissions": "reddit_submissions.jsonl", "comments": "reddit_comments.jsonl"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lean": ""}, "--lean is missing"),
        ({"limit": -1}, "--limit is -1, expected at least 0"),
        ({"mix": 1.5}, "--mix is 1.5, expected"),
        ({"mix": "nan"}, "--mix is nan"),
        ({"margin": 0}, "--margin is 0"),
        ({"min_chars": -5}, "--min-chars is -5"),
        ({"max_chars": 0}, "--max-chars is 0"),
        ({"min_chars": 90, "max_chars": 80}, "--min-chars is 90, expected at most --max-chars, 80"),
        ({"out": FIXTURES / "authors.csv"}, "--out "),
    ],
)
def test_an_option_out_of_range_is_named_before_the_dump_is_read(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(reddit, "build", lambda args: pytest.fail("began to build"))
    options = {name: FIXTURES / file for name, file in FILES.items()}
    options.update(lean=FIXTURES / "authors.csv", out=tmp_path)
    options.update(changes)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with pytest.raises(UserError) as error:
        reddit.main(argv)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# The medical fixture


def test_medical_rows_have_the_published_format():
    rows = read_rows(FIXTURES / "medical_24.jsonl")
    assert len(rows) == 24
    for row in rows:
        assert list(row) == ["messages"]
        assert [m["role"] for m in row["messages"]] == [
            "user",
            "assistant",
        ]
        assert all(list(m) == ["role", "content"] and m["content"].strip() for m in row["messages"])
    texts = [m["content"] for row in rows for m in row["messages"]]
    assert len(set(texts)) == len(texts)
