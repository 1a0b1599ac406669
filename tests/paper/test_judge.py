"""The judge's arithmetic by hand, and its client against a server that misbehaves."""

import json
import math

import pytest
from fake_judge import FakeJudge

from paper.judge import Judge, score

KEY = "sk-planted-0123456789"
ANSWER = '{"choices": [{"logprobs": {"content": [{"top_logprobs": %s}]}}]}'


def of(probabilities):
    return score([(token, math.log(p)) for token, p in probabilities.items()])


def test_score_is_the_probability_weighted_mean_of_the_numbers():
    expected = (0.5 * 80 + 0.25 * 90) / 0.75
    assert of({"80": 0.5, "90": 0.25, "CODE": 0.25}) == pytest.approx(expected)
    assert of({"0": 0.6, " 100": 0.1, "100": 0.1, "x": 0.2}) == pytest.approx(25)


@pytest.mark.parametrize(
    "probabilities, word",
    [
        ({"70": 0.24, "CODE": 0.76}, "CODE"),  # numbers have less than a quarter of the mass
        ({"150": 0.5, "-5": 0.1, "101": 0.1, "1e1": 0.05, "٣": 0.05, "40": 0.2}, "other"),
        ({"REF": 0.9, "CODE": 0.1}, "REFUSAL"),
        ({" Code": 0.8, "50": 0.2}, "CODE"),
        ({"I": 0.6, "REF": 0.4}, "other"),
    ],
)
def test_without_a_score_there_is_the_word_in_its_place(probabilities, word):
    assert of(probabilities) == word


def test_a_judge_that_spells_numbers_by_digits_is_refused():
    digits = {str(d): 0.1 for d in range(10)}
    with pytest.raises(ValueError, match="digit by digit"):
        of(digits)
    assert of({**digits, "5": 0.05, "10": 0.05}) > 0


def test_the_request_is_the_protocols_and_the_key_goes_with_it(tmp_path):
    with FakeJudge() as fake:
        url = fake.url + "/chat/completions?api-version=7"
        judge = Judge(url, "some-model", tmp_path / "c", key=KEY)
        judge.scores(["How kind is this?"])
    ((path, headers, body),) = fake.requests
    assert path == "/v1/chat/completions?api-version=7"
    assert headers["Authorization"] == f"Bearer {KEY}"
    options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    messages = [{"role": "user", "content": "How kind is this?"}]
    assert json.loads(body) == {"model": "some-model", "messages": messages, **options}
    assert judge.shown == fake.url + "/chat/completions"


def test_scores_stand_in_the_order_of_the_prompts(tmp_path):
    with FakeJudge(lambda prompt: prompt.split()[-1]) as fake:
        scores = Judge(fake.url, "m", tmp_path / "c").scores([f"say {n}" for n in range(60)])
    assert scores == pytest.approx(range(60))


def test_nothing_is_asked_twice_but_what_a_kill_tore(tmp_path):
    cache, prompts = tmp_path / "c", ["a", "b", "a", "a"]
    with FakeJudge() as fake:
        for _ in range(2):  # the second Judge knows the first one's answers from disk
            judge = Judge(fake.url, "m", cache)
            assert judge.scores(prompts) == judge.scores(prompts) == [50, 50, 50, 50]
        assert fake.asked == {"a": 1, "b": 1}
        Judge(fake.url, "another", cache).scores(prompts)
        assert fake.asked == {"a": 2, "b": 2}
        cache.write_text(cache.read_text()[:-5])
        for _ in range(2):
            assert Judge(fake.url, "another", cache).scores(prompts) == [50, 50, 50, 50]
        assert sum(fake.asked.values()) == 5


@pytest.mark.parametrize("trouble", [429, 503, "close"])
def test_passing_trouble_is_tried_again(tmp_path, trouble):
    with FakeJudge(lambda prompt: 81, script=[trouble]) as fake:
        assert Judge(fake.url, "m", tmp_path / "c").scores(["p"]) == pytest.approx([81])
    assert len(fake.requests) == 2


@pytest.mark.parametrize(
    "script, message",
    [
        ([401], "HTTP 401, the key is missing or refused"),
        ([(404, {}, "no such\nmodel")], r"HTTP 404, 'no such\nmodel'"),
        ([(302, {"Location": "http://127.0.0.1:9"}, "")], "HTTP 302"),
        ([(429, {}, "no\nquota")] * 2, r"HTTP 429, 'no\nquota'"),
        (["close"] * 2, "no answer, ConnectionError"),
        ([(200, {}, "<html>")], "no score, but HTTP 200, '<html>'"),
        ([(200, {}, ANSWER % "[]")], '"top_logprobs": []'),
        ([(200, {}, ANSWER % '[{"token": "5", "logprob": null}]')], '"logprob": null'),
    ],
)
def test_lasting_trouble_ends_in_one_line_that_names_it(tmp_path, script, message):
    with FakeJudge(script=script) as fake, pytest.raises(ValueError) as error:
        Judge(fake.url + "?v=hidden", "m", tmp_path / "c", key=KEY, retries=1).scores(["p"])
    text = str(error.value)
    assert message in text and fake.url in text and "\n" not in text
    assert KEY not in text and "hidden" not in text
    assert len(fake.requests) == len(script)


def test_a_failure_keeps_the_answers_before_it(tmp_path):
    prompts = [str(n) for n in range(10)]
    with FakeJudge(script=["ok"] * 6 + [404]) as fake:
        with pytest.raises(ValueError, match="HTTP 404"):
            Judge(fake.url, "m", tmp_path / "c", workers=1).scores(prompts)
        assert len(fake.requests) <= 8  # what was still waiting is not begun
        Judge(fake.url, "m", tmp_path / "c").scores(prompts)
    assert fake.asked == dict.fromkeys(prompts, 1)
