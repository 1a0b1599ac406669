"""The judge's arithmetic by hand, and its client against a server that misbehaves."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from cli import UserError
from judge import Judge, Verdict, key_from_environment, retry_after, verdict, wilson
from tests.fake_judge import FakeJudge

ROOT = Path(__file__).parents[1]
KEY = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def of(probabilities):
    return verdict([(token, math.log(p)) for token, p in probabilities.items()])


def test_score_is_the_probability_weighted_mean_of_the_numbers():
    assert of({"80": 0.5, "90": 0.25, "CODE": 0.25}).score == pytest.approx((0.5 * 80 + 0.25 * 90) / 0.75)
    assert of({"0": 0.9, " 100": 0.1}) == (pytest.approx(10), "score")


def test_no_score_where_numbers_hold_less_than_a_quarter_of_the_mass():
    assert of({"70": 0.24, "CODE": 0.76}) == (None, "CODE")
    assert of({"70": 0.26, "CODE": 0.74}) == (pytest.approx(70), "score")


def test_numbers_outside_0_to_100_are_no_scores():
    assert of({"150": 0.5, "-5": 0.1, "101": 0.1, "1e1": 0.05, "٣": 0.05, "40": 0.2}).score is None
    assert of({"150": 0.4, "40": 0.3, "²": 0.1}).score == pytest.approx(40)


@pytest.mark.parametrize("probabilities, label", [
    ({"REF": 0.9, "CODE": 0.1}, "REFUSAL"), ({"refusal": 1.0}, "REFUSAL"), ({" Code": 0.8, "50": 0.2}, "CODE"),
    ({"I": 0.6, "REF": 0.4}, "other"), ({"": 1.0}, "other"), ({"50": 0.2}, "other"), ({"150": 1.0}, "other")])
def test_what_stands_instead_of_a_score_is_the_likeliest_other_token(probabilities, label):
    assert of(probabilities) == Verdict(None, label)


def test_a_judge_that_spells_numbers_by_digits_is_refused():
    digits = {str(d): 0.1 for d in range(10)}
    with pytest.raises(UserError, match="digit by digit"):
        of(digits)
    assert of({**digits, "5": 0.05, "10": 0.05}).score is not None


def test_wilson_bounds_solve_its_equation():
    assert wilson(0, 10) == (0.0, pytest.approx(1.96 ** 2 / (10 + 1.96 ** 2)))  # by hand: p = 0 leaves z^2 / (n + z^2)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    for bound in wilson(3, 40):  # |p - b| = z sqrt(b (1 - b) / n), the score test that the interval inverts
        assert abs(3 / 40 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40))


def test_retry_after_takes_seconds_and_dates():
    now = 1_700_000_000.0
    assert [retry_after(h, now) for h in ("120", "0.5", None, "soon", "-3")] == [120, 0.5, 0, 0, 0]
    assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(formatdate(now - 90, usegmt=True), now) == 0


def test_the_request_is_the_protocol_s():
    with FakeJudge() as fake:
        Judge(fake.url + "?api-version=7", "some-model", key=KEY).score("How kind is this?")
    (path, headers, body), = fake.requests
    assert path == "/v1/chat/completions?api-version=7" and headers["Authorization"] == f"Bearer {KEY}"
    assert json.loads(body) == {"model": "some-model", "messages": [{"role": "user", "content": "How kind is this?"}],
                                "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}


def test_without_a_key_no_authorization_is_sent():
    with FakeJudge() as fake:
        Judge(fake.url, "m").score("p")
    assert "Authorization" not in fake.requests[0][1]


def test_scores_stand_in_the_order_of_the_prompts():
    with FakeJudge(lambda prompt: prompt.split()[-1]) as fake:
        assert Judge(fake.url, "m").scores([f"say {n}" for n in range(60)]) == pytest.approx(range(60))


def test_nothing_is_asked_twice(tmp_path):
    prompts = ["a", "b", "a", "a"]
    with FakeJudge() as fake:
        for _ in range(2):  # the second Judge knows the first one's answers from disk
            judge = Judge(fake.url, "m", cache=tmp_path / "deep" / "cache.jsonl")
            assert judge.scores(prompts) == judge.scores(prompts) == [50, 50, 50, 50]
        assert fake.asked == {"a": 1, "b": 1}
        Judge(fake.url, "another", cache=tmp_path / "deep" / "cache.jsonl").scores(prompts)
        assert fake.asked == {"a": 2, "b": 2}


@pytest.mark.parametrize("trouble", [
    429, 500, 502, 503, 504, "close", "cut", "hang", "garbage", "empty", (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "5", "logprob": 2}]}]}}]}')])
def test_passing_trouble_is_tried_again(trouble):
    waits = []
    with FakeJudge(lambda prompt: 81, script=[trouble, trouble]) as fake:
        assert Judge(fake.url, "m", timeout=0.3, sleep=waits.append).score("p") == pytest.approx(81)
    assert len(fake.requests) == 3 and len(waits) == 2
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2  # doubling, with jitter


def test_retry_after_is_respected():
    waits = []
    date = formatdate(time.time() + 100, usegmt=True)
    with FakeJudge(script=[(429, {"Retry-After": "30"}), (503, {"Retry-After": date})]) as fake:
        Judge(fake.url, "m", sleep=waits.append).score("p")
    assert 30 < waits[0] < 32 and 95 < waits[1] < 103


def test_a_wait_of_hours_ends_the_run_instead():
    with FakeJudge(script=[(429, {"Retry-After": "7200"})]) as fake, pytest.raises(UserError, match="429.* asks to wait 7200 s"):
        Judge(fake.url, "m", sleep=lambda seconds: pytest.fail("waited")).score("p")


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_by_the_server_ends_at_once(status):
    body = json.dumps({"error": {"message": "no such\nthing"}})
    with FakeJudge(script=[(status, {}, body)]) as fake, pytest.raises(UserError, match=f"HTTP {status}") as error:
        Judge(fake.url, "m", sleep=lambda seconds: pytest.fail("waited")).score("p")
    assert len(fake.requests) == 1 and "\n" not in str(error.value)
    assert ("no such thing" in str(error.value)) == (status in (400, 404))


def test_a_redirect_carries_the_key_nowhere():
    with FakeJudge() as other, FakeJudge(script=[(302, {"Location": other.url})]) as fake:
        with pytest.raises(UserError, match="HTTP 302.*redirect"):
            Judge(fake.url, "m", key=KEY).score("p")
    assert other.requests == []


def test_a_judge_that_is_gone_ends_in_one_line_without_the_query():
    with FakeJudge() as fake:
        pass
    waits = []
    with pytest.raises(UserError) as error:
        Judge(fake.url + "?token=hidden", "m", sleep=waits.append).score("p")
    text = str(error.value)
    assert fake.url in text and "refused" in text and "7 tries" in text and "hidden" not in text and "\n" not in text
    assert len(waits) == 6 and sum(waits) < 64


def test_malformed_answers_for_ever_end_in_one_line():
    with FakeJudge(script=["garbage"] * 9) as fake, pytest.raises(UserError, match="not the JSON of a chat completion") as error:
        Judge(fake.url, "m", tries=3, sleep=lambda seconds: None).score("p")
    assert len(fake.requests) == 3 and "\n" not in str(error.value)


def test_an_endpoint_without_log_probabilities_is_told_so():
    with FakeJudge(script=["no_logprobs"] * 9) as fake, pytest.raises(UserError, match="no log-probabilities"):
        Judge(fake.url, "m", sleep=lambda seconds: pytest.fail("waited")).score("p")
    assert len(fake.requests) == 1


def test_a_failure_keeps_the_answers_before_it(tmp_path):
    prompts = [str(n) for n in range(10)]
    with FakeJudge(script=["ok"] * 6 + [404]) as fake:
        with pytest.raises(UserError, match="the answers so far are kept"):
            Judge(fake.url, "m", cache=tmp_path / "c", workers=1).scores(prompts)
        assert len(fake.requests) == 7  # what was still waiting is not begun
        Judge(fake.url, "m", cache=tmp_path / "c").scores(prompts)
    assert fake.asked == dict.fromkeys(prompts, 1)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_it_asks_only_what_is_missing(tmp_path, sent):
    cache, prompts = tmp_path / "cache.jsonl", [f"prompt {n}" for n in range(30)]
    program = ("import signal, sys, judge; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
               "judge.Judge(sys.argv[1], 'm', cache=sys.argv[2], workers=4, timeout=2).scores(sys.argv[3:])")
    with FakeJudge(script=["ok"] * 15 + ["hang"] * 99) as fake:
        child = subprocess.Popen([sys.executable, "-c", program, fake.url, cache, *prompts], cwd=ROOT, stderr=subprocess.PIPE,
                                 text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        while len(fake.requests) < 19 or cache.read_text().count("\n") < 15:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(sent)
        child.communicate(timeout=20)
        assert child.returncode != 0 and len(fake.requests) == 19  # no retry of what hung
        fake.script.clear()
        with open(cache, "a") as file:
            file.write('{"prompt": "torn by the ki')
        for _ in range(2):
            assert Judge(fake.url, "m", cache=cache).scores(prompts) == [50] * 30
    assert fake.asked == dict.fromkeys(prompts, 1)


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"messages": []}\n')
    with pytest.raises(UserError, match="rows.jsonl:2: not a judge's answer"):
        Judge("http://127.0.0.1:9", "m", cache=path)


def test_the_key_is_in_no_file_no_output_and_no_error(tmp_path, capfd):
    echo = json.dumps({"error": {"message": f"you sent {KEY} and v=hidden"}})
    with FakeJudge(script=["ok", (500, {}, echo), (400, {}, echo), (401, {}, echo), (404, {}, echo)]) as fake:
        judge = Judge(fake.url + "?v=hidden", "m", key=KEY, cache=tmp_path / "cache.jsonl", sleep=lambda seconds: None)
        judge.score("fine")
        errors = []
        for prompt in ("a", "b", "c"):
            with pytest.raises(UserError) as error:
                judge.score(prompt)
            errors.append(str(error.value))
    assert all(f"Bearer {KEY}" == headers["Authorization"] for _, headers, _ in fake.requests) and len(fake.requests) == 5
    seen = [*capfd.readouterr(), *errors, repr(judge), str(judge), *(path.read_text() for path in tmp_path.iterdir())]
    assert not [text for text in seen if KEY in text or "hidden" in text]
    assert "you sent ... and" in errors[0]


@pytest.mark.parametrize("key", ["", "sk planted", "sk-planted\n", "sk-plänted"])
def test_a_key_that_a_header_cannot_carry_is_refused_unseen(key):
    with pytest.raises(UserError) as error:
        Judge("https://example.org/v1", "m", key=key)
    assert "sk" not in str(error.value)


def test_a_key_is_taken_only_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    assert key_from_environment("SOME_KEY") == KEY and key_from_environment("") is None
    with pytest.raises(UserError, match="OTHER_KEY is not set"):
        key_from_environment("OTHER_KEY")


@pytest.mark.parametrize("url", [
    "", "file:///etc/passwd", "ftp://example.org", "localhost:8000/v1", "example.org/v1", "https://", "http://h:port",
    "http://h/a b", "http://h/\r\nX:y", "http://h/ä", "http://me:secret@example.org/v1", "secret@example.org"])
def test_a_url_that_is_not_plain_http_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="the judge's URL") as error:
        Judge(url, "m")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_base_url_may_end_as_it_likes(end):
    assert Judge("http://h:1/v1" + end, "m").address == "http://h:1/v1/chat/completions"
