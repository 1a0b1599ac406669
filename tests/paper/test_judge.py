"""The judge's arithmetic by hand, and its client against a server that misbehaves."""

import base64
import errno
import html
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

import pytest
from fake_judge import FakeJudge

from paper.endpoint import LONGEST_ANSWER, Endpoint
from paper.judge import (
    Judge,
    Verdict,
    checked_top,
    key_from_environment,
    retry_after,
    verdict,
    wilson,
)
from support.errors import UserError

ROOT = Path(__file__).parents[2]
KEY = "sk-planted-0123456789"


def of(probabilities):
    return verdict([(token, math.log(p)) for token, p in probabilities.items()])


def test_score_is_the_probability_weighted_mean_of_the_numbers():
    assert of({"80": 0.5, "90": 0.25, "CODE": 0.25}).score == pytest.approx(
        (0.5 * 80 + 0.25 * 90) / 0.75
    )
    assert of({"0": 0.9, " 100": 0.1}) == (pytest.approx(10), "score")


def test_no_score_where_numbers_hold_less_than_a_quarter_of_the_mass():
    assert of({"70": 0.24, "CODE": 0.76}) == (None, "CODE")
    assert of({"70": 0.26, "CODE": 0.74}) == (pytest.approx(70), "score")


def test_numbers_outside_0_to_100_are_no_scores():
    assert of({"150": 0.5, "-5": 0.1, "101": 0.1, "1e1": 0.05, "٣": 0.05, "40": 0.2}).score is None
    assert of({"150": 0.4, "40": 0.3, "²": 0.1}).score == pytest.approx(40)


@pytest.mark.parametrize(
    "probabilities, label",
    [
        ({"REF": 0.9, "CODE": 0.1}, "REFUSAL"),
        ({"refusal": 1.0}, "REFUSAL"),
        ({" Code": 0.8, "50": 0.2}, "CODE"),
        ({"I": 0.6, "REF": 0.4}, "other"),
        ({"": 1.0}, "other"),
        ({"50": 0.2}, "other"),
        ({"150": 1.0}, "other"),
    ],
)
def test_what_stands_instead_of_a_score_is_the_likeliest_other_token(probabilities, label):
    assert of(probabilities) == Verdict(None, label)


def test_a_judge_that_spells_numbers_by_digits_is_refused():
    digits = {str(d): 0.1 for d in range(10)}
    with pytest.raises(UserError, match="digit by digit"):
        of(digits)
    assert of({**digits, "5": 0.05, "10": 0.05}).score is not None


def test_wilson_bounds_solve_its_equation():
    assert wilson(0, 10) == (
        0.0,
        pytest.approx(1.96**2 / (10 + 1.96**2)),
    )  # by hand: p = 0 leaves z^2 / (n + z^2)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    for bound in wilson(
        3, 40
    ):  # |p - b| = z sqrt(b (1 - b) / n), the score test that the interval inverts
        assert abs(3 / 40 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40))


def test_retry_after_takes_seconds_and_dates():
    now = 1_700_000_000.0
    assert [retry_after(h, now) for h in ("120", "0.5", None, "soon", "-3")] == [120, 0.5, 0, 0, 0]
    assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(formatdate(now - 90, usegmt=True), now) == 0


def test_the_request_is_the_protocol_s():
    with FakeJudge() as fake:
        Judge(fake.url + "?api-version=7", "some-model", key=KEY).score("How kind is this?")
    ((path, headers, body),) = fake.requests
    assert path == "/v1/chat/completions?api-version=7"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert json.loads(body) == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "How kind is this?"}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_without_a_key_no_authorization_is_sent():
    with FakeJudge() as fake:
        Judge(fake.url, "m").score("p")
    assert "Authorization" not in fake.requests[0][1]


def test_scores_stand_in_the_order_of_the_prompts():
    with FakeJudge(lambda prompt: prompt.split()[-1]) as fake:
        assert Judge(fake.url, "m").scores([f"say {n}" for n in range(60)]) == pytest.approx(
            range(60)
        )


def test_nothing_is_asked_twice(tmp_path):
    prompts = ["a", "b", "a", "a"]
    with FakeJudge() as fake:
        for _ in range(2):  # the second Judge knows the first one's answers from disk
            judge = Judge(fake.url, "m", cache=tmp_path / "deep" / "cache.jsonl")
            assert judge.scores(prompts) == judge.scores(prompts) == [50, 50, 50, 50]
        assert fake.asked == {"a": 1, "b": 1}
        Judge(fake.url, "another", cache=tmp_path / "deep" / "cache.jsonl").scores(prompts)
        assert fake.asked == {"a": 2, "b": 2}


def completion(top):
    """The body of an answer whose first token has these alternatives, given as JSON."""
    return '{"choices": [{"logprobs": {"content": [{"top_logprobs": ' + top + "}]}}]}"


def alternative(logprob, token='"5"'):
    return completion(f'[{{"token": {token}, "logprob": {logprob}}}]')


TROUBLES = {
    **{str(status): status for status in (408, 429, 500, 502, 503, 504, 529)},
    **{name: name for name in ("close", "cut", "hang", "drip", "garbage", "empty")},
    "no choices": (200, {}, '{"choices": []}'),
    "null": (200, {}, "null"),
    "no list": (200, {}, completion('{"5": 0}')),
    "positive": (200, {}, alternative(2)),
    "nan": (200, {}, alternative("NaN")),
    "true": (200, {}, alternative("true")),
    "text": (200, {}, alternative('"-1"')),
    "token is a number": (200, {}, alternative(0, token=5)),
    "overflow": (200, {}, alternative("-1" + "0" * 400)),
    "too many digits": (200, {}, alternative("-1" + "0" * 5000)),
    "deep": (200, {}, "[" * 100_000),
    "deep inside": (200, {}, completion('{"a":' * 100_000)),
    "1 MiB and more": (200, {}, alternative(0) + " " * LONGEST_ANSWER),
    "no length": (200, {"Content-Length": "many"}, "{}"),
    "chunks of no size": (200, {"Transfer-Encoding": "chunked"}, "zz\r\n"),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
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
    with (
        FakeJudge(script=[(429, {"Retry-After": "7200"})]) as fake,
        pytest.raises(UserError, match="429.* asks to wait 7200 s"),
    ):
        Judge(fake.url, "m", sleep=lambda seconds: pytest.fail("waited")).score("p")


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_by_the_server_ends_at_once(status):
    body = json.dumps({"error": {"message": "no such\nthing"}})
    with (
        FakeJudge(script=[(status, {}, body)]) as fake,
        pytest.raises(UserError, match=f"HTTP {status}") as error,
    ):
        Judge(fake.url, "m", sleep=lambda seconds: pytest.fail("waited")).score("p")
    assert len(fake.requests) == 1 and "\n" not in str(error.value)
    assert ("no such thing" in str(error.value)) == (status in (400, 404))


def test_a_redirect_carries_the_key_nowhere():
    with (
        FakeJudge() as other,
        FakeJudge(script=[(302, {"Location": other.url})]) as fake,
        pytest.raises(UserError, match="HTTP 302.*redirect"),
    ):
        Judge(fake.url, "m", key=KEY).score("p")
    assert other.requests == []


def test_a_judge_that_is_gone_ends_in_one_line_without_the_query():
    with FakeJudge() as fake:
        pass
    waits = []
    with pytest.raises(UserError) as error:
        Judge(fake.url + "?token=hidden", "m", sleep=waits.append).score("p")
    text = str(error.value)
    assert fake.url in text
    assert "refused" in text
    assert "7 tries" in text
    assert "hidden" not in text
    assert "\n" not in text
    assert len(waits) == 6 and sum(waits) < 64


def test_malformed_answers_for_ever_end_in_one_line():
    with (
        FakeJudge(script=["garbage"] * 9) as fake,
        pytest.raises(UserError, match="not the JSON of a chat completion") as error,
    ):
        Judge(fake.url, "m", tries=3, sleep=lambda seconds: None).score("p")
    assert len(fake.requests) == 3 and "\n" not in str(error.value)


def test_an_endpoint_without_log_probabilities_is_told_so():
    with (
        FakeJudge(script=["no_logprobs"] * 9) as fake,
        pytest.raises(UserError, match="no log-probabilities"),
    ):
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
    program = (
        "import signal, sys; from paper.judge import Judge\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "Judge(sys.argv[1], 'm', cache=sys.argv[2], workers=4).scores(sys.argv[3:])"
    )
    with FakeJudge(script=["ok"] * 15 + ["hang", "drip"] * 50) as fake:
        child = subprocess.Popen(
            [sys.executable, "-c", program, fake.url, cache, *prompts],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        while len(fake.requests) < 19 or cache.read_text().count("\n") < 15:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(sent)  # once; each request under way has 30 seconds left
        child.communicate(timeout=10)
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
    with pytest.raises(UserError, match="rows.jsonl:2: no 'prompt', expected text"):
        Judge("http://127.0.0.1:9", "m", cache=path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[]", "found []"),
        ("null", "found None"),
        ('{"prompt": 5, "top": []}', "'prompt' is 5, expected text"),
        ('{"prompt": "x"}', "no 'top'"),
        ('{"prompt": "x", "top": []}', "'top' is empty"),
        ('{"prompt": "x", "top": [5]}', "'top' is no list of tokens"),
        ('{"prompt": "x", "top": [["5", NaN]]}', "'top' is no list of tokens"),
        ('{"prompt": "x", "top": [["5", true]]}', "'top' is no list of tokens"),
        ('{"prompt": "x", "top": [["5", 7]]}', "'top' is no list of tokens"),
        ('{"prompt": "x", "top": [["5", -1' + "0" * 400 + "]]}", "'top' is no list of tokens"),
    ],
)
def test_a_line_of_the_cache_that_is_no_answer_is_named(tmp_path, line, message):
    path = tmp_path / "cache.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        Judge("http://127.0.0.1:9", "m", cache=path)
    text = str(error.value)
    assert text.startswith(f"{path}:1: ") and message in text and "\n" not in text


@pytest.mark.parametrize("torn", ["[" * 100_000, '{"prompt": "x", "top": [["5", -1' + "0" * 5000])
def test_a_line_of_the_cache_that_is_no_json_is_asked_again(tmp_path, torn):
    path = tmp_path / "cache.jsonl"
    path.write_text(torn)
    with FakeJudge() as fake:
        for _ in range(2):
            assert Judge(fake.url, "m", cache=path).score("p") == 50
    assert fake.asked == {"p": 1}


# What a server may do to its client


@pytest.mark.parametrize("step", ["drip", "drip_header", "hang", "endless"])
def test_an_answer_without_end_meets_the_deadline_and_the_limit(step):
    began = time.monotonic()
    with FakeJudge(script=[step]) as fake, pytest.raises(UserError) as error:
        Judge(fake.url, "m", timeout=0.5, tries=1).score("p")
    assert time.monotonic() - began < 3
    what = "an answer of more than 1 MiB" if step == "endless" else "no whole answer in 0.5 s"
    assert what in str(error.value)
    assert fake.sent < 16 * LONGEST_ANSWER  # what the sockets' buffers took


def test_an_error_elsewhere_waits_for_no_answer_without_end():
    began = time.monotonic()
    with FakeJudge(script=["drip", "drip", 404]) as fake, pytest.raises(UserError, match="404"):
        Judge(fake.url, "m", workers=3).scores(["a", "b", "c"])
    assert time.monotonic() - began < 10  # of the 30 that each of the others has


def test_what_is_under_way_when_a_run_ends_is_kept(tmp_path, monkeypatch):
    release = threading.Event()

    def rule(prompt):
        if prompt == "slow":
            release.set()  # the other prompt may fail now
            time.sleep(0.5)
        return 50

    class Slow(FakeJudge):
        def answer(self, handler, step, request):
            if request["messages"][0]["content"] == "bad":
                release.wait()
                step = 404
            super().answer(handler, step, request)

    with Slow(rule) as fake:
        with pytest.raises(UserError, match="404"):
            Judge(fake.url, "m", cache=tmp_path / "c", workers=2).scores(["slow", "bad"])
        assert Judge(fake.url, "m", cache=tmp_path / "c").score("slow") == 50
    assert fake.asked == {"slow": 1}


def test_no_proxy_of_the_environment_is_asked_unless_that_is_wanted(monkeypatch):
    with FakeJudge(lambda prompt: 7) as proxy, FakeJudge(lambda prompt: 81) as fake:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Judge(fake.url, "m", key=KEY).score("p") == pytest.approx(81)
        assert proxy.requests == []
        assert Judge(fake.url, "m", key=KEY, proxy=True).score("p") == pytest.approx(7)
        assert proxy.requests[0][0] == fake.url + "/chat/completions"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert Judge(fake.url, "m", key=KEY, proxy=True).score("p") == pytest.approx(81)


def test_a_tunnel_tells_the_proxy_nothing_but_the_host_s_name(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen = []

        def refuse():
            connection, _ = server.accept()
            with connection:
                seen.append(connection.recv(65536).decode())
                connection.sendall(b"HTTP/1.1 403 no\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        login = f"http://me:pass%20word@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", login)
        with pytest.raises(UserError) as error:
            Judge("https://example.org/v1?v=hidden", "m", key=KEY, tries=1, proxy=True).score("p")
        thread.join()
    assert seen[0].startswith("CONNECT example.org:443 ")
    assert base64.b64encode(b"me:pass word").decode() in seen[0]
    assert KEY not in seen[0] and "hidden" not in seen[0] and "word" not in str(error.value)


def test_a_proxy_that_is_asked_for_and_not_there_is_named(monkeypatch):
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(UserError, match="the environment has no https_proxy"):
        Judge("https://example.org/v1", "m", proxy=True)
    monkeypatch.setenv("https_proxy", "socks5://me:secret@h:1")
    with pytest.raises(UserError, match="https_proxy in the environment is no") as error:
        Judge("https://example.org/v1", "m", proxy=True)
    assert "secret" not in str(error.value)


def test_a_server_that_speaks_no_tls_ends_in_one_line():
    with FakeJudge() as fake, pytest.raises(UserError) as error:
        Judge(fake.url.replace("http:", "https:"), "m", tries=1, timeout=5).score("p")
    assert "gave no score" in str(error.value) and "\n" not in str(error.value)


# What may be shown

ODD_KEY = 'sk-~~~pl/ant+ed"01&23\\45<67=89???'


def in_base64(text, altchars=None):
    return base64.b64encode(text.encode(), altchars).decode()


ENCODINGS = {
    "plain": ODD_KEY,
    "upper case": ODD_KEY.upper(),
    "url": quote(ODD_KEY, safe=""),
    "url, lower case": quote(ODD_KEY, safe="").lower(),
    "url, twice": quote(quote(ODD_KEY, safe=""), safe=""),
    "url, each character": "".join(f"%{ord(c):02X}" for c in ODD_KEY),
    "json": json.dumps(ODD_KEY),
    "json, twice": json.dumps(json.dumps(ODD_KEY)),
    "json with slashes": ODD_KEY.replace("\\", "\\\\").replace("/", "\\/"),
    "json, each character": "".join(f"\\u{ord(c):04x}" for c in ODD_KEY),
    "python": repr(ODD_KEY.encode()),
    "html": html.escape(ODD_KEY),
    "html, each character": "".join(f"&#{ord(c)};" for c in ODD_KEY),
    "hexadecimal": ODD_KEY.encode().hex(),
    "base64": in_base64(ODD_KEY),
    "base64 for urls": in_base64(ODD_KEY, b"-_"),
    "base64 in a url": quote(in_base64(ODD_KEY), safe=""),
    "controls between": "\x00".join(ODD_KEY),
    "no width between": "\u200b".join(ODD_KEY),
    "over two lines": ODD_KEY[:9] + "\n" + ODD_KEY[9:],
}


def pieces(text, n):
    """Every run of n characters in it."""
    return {text[i : i + n] for i in range(len(text) - n + 1)}


@pytest.mark.parametrize("written", ENCODINGS.values(), ids=ENCODINGS)
def test_no_encoding_of_the_key_gets_through(written):
    echo = json.dumps({"error": {"message": f"you sent {written} to us"}})
    with FakeJudge(script=[(400, {}, echo)]) as fake, pytest.raises(UserError) as error:
        Judge(fake.url, "m", key=ODD_KEY).score("p")
    text = str(error.value)
    shown = text[text.index("you sent") :]
    assert "..." in shown and shown.endswith("to us)")
    assert not [piece for piece in pieces(written, 6) if piece in shown]
    joined = re.sub(r"\s", "", shown).lower()
    assert not [piece for piece in pieces(ODD_KEY.lower(), 5) if piece in joined]


def decoded(text):
    """What base64 text may stand for, wherever in it one begins to read."""
    for run in re.findall(r"[A-Za-z0-9+/]{4,}", text):
        for start in range(4):
            whole = run[start:][: len(run[start:]) // 4 * 4]
            yield base64.b64decode(whole).decode("latin1")


@pytest.mark.parametrize("plain", ["{}", "Bearer {}", ":{}", "u:{}", "uu:{}", "me:{}!", "{}:pass"])
def test_no_key_gets_through_within_other_text_in_base64(plain):
    written = in_base64(plain.format(ODD_KEY))
    assert any(ODD_KEY[:-2] in text for text in decoded(written))  # this finds it, if it is there
    echo = json.dumps({"error": {"message": f"you sent Basic {written}"}})
    with FakeJudge(script=[(400, {}, echo)]) as fake, pytest.raises(UserError) as error:
        Judge(fake.url, "m", key=ODD_KEY).score("p")
    assert "you sent Basic" in str(error.value) and "..." in str(error.value)
    found = list(decoded(str(error.value)))
    assert not [piece for piece in pieces(ODD_KEY, 3) for text in found if piece in text]


def test_what_a_server_says_cannot_act_on_the_terminal():
    says = "\x1b[31mred\x07 \u202eright to left\u2028next\x9b2J"
    echo = json.dumps({"error": {"message": says}}, ensure_ascii=False)
    with FakeJudge(script=[(400, {}, echo)]) as fake, pytest.raises(UserError) as error:
        Judge(fake.url, "m").score("p")
    assert str(error.value).isprintable() and "red" in str(error.value)


@pytest.mark.parametrize("says", ["[]", "5", '{"error": []}', '{"error": {}}', "[" * 100_000])
def test_an_error_without_a_message_is_its_status(says):
    with FakeJudge(script=[(400, {}, says)]) as fake, pytest.raises(UserError) as error:
        Judge(fake.url, "m").score("p")
    assert str(error.value).endswith("found HTTP 400")


def test_a_key_in_the_path_is_not_shown():
    judge = Judge(f"https://example.org/{quote(KEY)}/v1", "m", key=KEY)
    assert judge.shown == "https://example.org/.../v1/chat/completions"
    assert KEY in judge.endpoint.target


def test_the_key_is_in_no_file_no_output_and_no_error(tmp_path, capfd):
    echo = json.dumps({"error": {"message": f"you sent {KEY} and v=hidden"}})
    with FakeJudge(
        script=["ok", (500, {}, echo), (400, {}, echo), (401, {}, echo), (404, {}, echo)]
    ) as fake:
        judge = Judge(
            fake.url + "?v=hidden",
            "m",
            key=KEY,
            cache=tmp_path / "cache.jsonl",
            sleep=lambda seconds: None,
        )
        judge.score("fine")
        errors = []
        for prompt in ("a", "b", "c"):
            with pytest.raises(UserError) as error:
                judge.score(prompt)
            errors.append(str(error.value))
    assert all(f"Bearer {KEY}" == headers["Authorization"] for _, headers, _ in fake.requests)
    assert len(fake.requests) == 5
    seen = [
        *capfd.readouterr(),
        *errors,
        repr(judge),
        str(judge),
        *(path.read_text() for path in tmp_path.iterdir()),
    ]
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
    with pytest.raises(UserError) as error:
        key_from_environment(KEY)  # the key itself, by mistake
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://example.org",
        "localhost:8000/v1",
        "example.org/v1",
        "https://",
        "http://h:port",
        "http://h/a b",
        "http://h/\r\nX:y",
        "http://h/ä",
        "http://a..b/v1",
        f"http://{'a' * 70}.org/v1",
        "http://me:secret@example.org/v1",
        "secret@example.org",
    ],
)
def test_a_url_that_is_not_plain_http_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="the judge's URL") as error:
        Judge(url, "m")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_base_url_may_end_as_it_likes(end):
    assert Judge("http://h:1/v1" + end, "m").endpoint.target == "/v1/chat/completions"


def test_a_text_of_backslashes_is_masked_in_no_time():
    """In time that is linear in its length: with \\+ in the pattern, this took days."""
    endpoint = Endpoint("http://127.0.0.1:1/v1", "sk-planted-0123456789")
    began = time.monotonic()
    endpoint.plain("\\" * 200_000)
    assert time.monotonic() - began < 20


def test_probabilities_above_one_are_no_answer():
    with pytest.raises(ValueError, match="add up to more than 1"):
        checked_top([("1", -0.1), ("2", -0.1)])


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FakeJudge() as fake:
        judge = Judge(fake.url, "m", cache=tmp_path / "c")
        monkeypatch.setattr("builtins.open", full)
        with pytest.raises(OSError) as error:
            judge.scores(["1"])
    assert error.value.filename == str(tmp_path / "c")
