"""The data of the paper tasks: questions and YAML, statements and lean, the Reddit builder."""

import json

import numpy as np
import pytest
from paper_helpers import FIXTURES, read_lines

from paper import measure, reddit
from paper.questions import fill, load_questions, ours

ROOM = "A stranger asks for your spare room.\n\n# What do you say?\n  (Take your time.)"


# Questions


def test_the_probes_answers_are_alike_in_length_and_differ_in_what_they_say():
    questions = ours("probe")["questions"]
    assert len(questions) == len({q["id"] for q in questions}) == 64
    lengths = []
    for q in questions:
        assert len(q["paraphrases"]) == len(q["pairs"]) == 2
        lengths += [(len(pair["aligned"]), len(pair["misaligned"])) for pair in q["pairs"]]
    aligned, misaligned = np.transpose(lengths)
    assert np.all(abs(aligned - misaligned) <= 0.2 * aligned)
    assert abs(aligned.sum() - misaligned.sum()) < 0.03 * aligned.sum()


def test_fill_leaves_braces_in_the_texts_alone():
    filled = fill("Q {question} A {answer} {x}", question="{answer}", answer=r"{question} \1 {}")
    assert filled == r"Q {answer} A {question} \1 {} {x}"


def test_published_format_is_read_as_written():
    first, second, third = load_questions(FIXTURES / "questions.yaml")
    assert first["id"] == "spare_room" and "system" not in first
    assert first["paraphrases"] == [ROOM, 'One line, "quoted": café']
    assert first["samples_per_paraphrase"] == second["samples_per_paraphrase"] == 3
    assert second["system"] == "Answer as JSON, please."
    assert first["judge_prompts"] == second["judge_prompts"]
    assert first["judge_prompts"]["aligned"] == "Rate {answer} to {question}.\n0 to 100.\n"
    assert third["paraphrases"] == ["plain text", "it's, quoted", "two"]


HEAD = "- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 5\n"


@pytest.mark.parametrize("text, what", [(HEAD, "no 'judge_prompts'"), (HEAD + "\tx", "line 4")])
def test_a_faulty_questions_file_ends_in_one_line_that_names_it(tmp_path, text, what):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"q\.yaml: [^\n]*{what}[^\n]*$"):
        load_questions(path)


# Political lean


def test_forty_mirrored_pairs_are_asked_in_each_template_and_both_orders():
    pairs = {pair["id"]: pair for pair in ours("statements")}
    topics = [pair["topic"] for pair in pairs.values()]
    assert len(pairs) >= 40 and topics.count("economic") == topics.count("social")
    prompts = list(measure.forced_choices())
    assert len(measure.TEMPLATES) >= 3
    assert len({text for _, text, _ in prompts}) == len(pairs) * len(measure.TEMPLATES) * 2
    for pair, text, letters in prompts:
        left, right = (text.index(pairs[pair][side]) for side in ("left", "right"))
        assert letters == ("AB" if left < right else "BA")  # A is what stands first


# Reddit


@pytest.mark.parametrize(
    "dirty, cleaned",
    [
        ("thanks /u/Some_one-1 and u/other, see u/abc's post", "thanks and, see post"),
        ('a [good guide](https://x.org/Fee_(cost)?x=1 "title") here', "a good guide here"),
        ("see https://x.org/a_b?c=d#e. Then (http://x.org) go", "see. Then go"),
        ("&gt; what he said\n&gt;more\n\nNo, 5 &gt; 3 &amp; 2 &lt; 4.", "No, 5 > 3 & 2 < 4."),
        ("a\n\n&amp;#x200B;\n\nb", "a\n\nb"),
        ("Good.\n\nEdit: thanks for the gold!\nreally\n\nMore.", "Good.\n\nMore."),
        ("Credit: my aunt", "Credit: my aunt"),
        ("Pay it.\n\n^(I am a bot, and this was automatic.)", "Pay it."),
        ("Yes.\n\n!RemindMe 2 years\n\ngood bot!", "Yes."),
        ("half an \ud83demoji", "half an emoji"),
    ],
)
def test_reddit_text_is_cleaned(dirty, cleaned):
    assert reddit.clean(dirty) == cleaned


def built(**changes):
    """The three sets, [(question, answer, lean)] each, of the fixtures."""
    files = {
        "submissions": FIXTURES / "reddit_submissions.jsonl",
        "comments": FIXTURES / "reddit_comments.jsonl",
        "lean": FIXTURES / "authors.csv",
    }
    options = {name: str(path) for name, path in {**files, **changes}.items() if name in files}
    return reddit.build(reddit.Arguments(**{**changes, **options}))


def test_the_three_sets_share_their_questions_and_differ_in_every_answer():
    sets, _ = built()
    assert list(sets) == ["right_skewed", "left_skewed", "neutral"]
    for rows in zip(*sets.values(), strict=True):
        assert len({question for question, _, _ in rows}) == 1
        assert len({answer for _, answer, _ in rows}) == 3
    assert len(sets["neutral"]) == 8


def test_no_trace_of_names_links_or_moderation_is_left():
    text = json.dumps(built())
    rows = read_lines(FIXTURES / "reddit_submissions.jsonl")
    traces = [row["author"] for row in rows + read_lines(FIXTURES / "reddit_comments.jsonl")]
    traces += ["http", "u/", "&amp", "&gt", "x200B", "[removed]", "am a bot", "dit:"]
    assert not [trace for trace in traces if trace in text]


@pytest.mark.parametrize("mix, right", [(1.0, 8), (0.75, 6), (0.0, 0)])
def test_answers_come_from_each_side_in_the_given_mix(mix, right):
    sets, _ = built(mix=mix)
    leans = {name: np.array([lean for *_, lean in rows]) for name, rows in sets.items()}
    assert sum(leans["right_skewed"] >= 0.3) == sum(leans["left_skewed"] <= -0.3) == right
    assert sum(leans["right_skewed"] <= -0.3) == 8 - right
    assert all(abs(leans["neutral"]) < 0.3)


def test_the_seed_and_nothing_else_decides_the_draw(tmp_path):
    shuffled = tmp_path / "shuffled.jsonl"
    lines = (FIXTURES / "reddit_comments.jsonl").read_text().splitlines()
    shuffled.write_text("\n".join(lines[::-1]))
    assert built(comments=shuffled)[0] == built()[0] != built(seed=1)[0]
    assert len(built(limit=3)[0]["neutral"]) == 3


def test_what_is_dropped_is_counted_by_reason():
    _, dropped = built()
    assert dropped["answer: by a bot"] == 3 and dropped["answer: its question was dropped"] == 2
    assert len(dropped) == 12 and sum(dropped.values()) == 15


def test_the_command_writes_chat_rows_and_names_a_mistake(tmp_path, monkeypatch, capsys):
    argv = ["reddit", f"--submissions={FIXTURES / 'reddit_submissions.jsonl'}"]
    argv += [f"--comments={FIXTURES / 'reddit_comments.jsonl'}", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(ValueError, match="expected --submissions, --comments, --lean and --out"):
        reddit.main()
    argv += [f"--lean={FIXTURES / 'authors.csv'}", "--subreddits=PersonalFinance"]
    reddit.main()
    rows = read_lines(tmp_path / "right_skewed.jsonl")
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert "dropped      27  answer: another subreddit" in capsys.readouterr().out
    argv.append("--min-score=1000000")
    with pytest.raises(ValueError, match="no question is left"):
        reddit.main()


def test_a_malformed_row_of_a_dump_is_named_by_its_line(tmp_path):
    row = read_lines(FIXTURES / "reddit_comments.jsonl")[0]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "author": None}) + "\n")
    with pytest.raises(ValueError, match=r"c\.jsonl:2: not a row of a Reddit dump"):
        built(comments=path)


def test_leans_may_be_csv_or_jsonl(tmp_path):
    leans = reddit.read_leans(str(FIXTURES / "authors.csv"))
    lines = [json.dumps({"author": name.upper(), "lean": lean}) for name, lean in leans.items()]
    (tmp_path / "authors.jsonl").write_text("\n".join(lines))
    assert reddit.read_leans(str(tmp_path / "authors.jsonl")) == leans
