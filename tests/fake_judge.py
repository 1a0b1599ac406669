"""An OpenAI-compatible chat endpoint on 127.0.0.1: answers by a rule, and misbehaves on order."""

import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeJudge:
    """`with FakeJudge(rule) as judge`: serves judge.url, a base URL.

    rule(prompt) gives the first token: a number or a word, or {token: probability}.
    script: what the first requests meet, in the order of their arrival, one entry each: "ok"; an
    HTTP status, or (status, {header: value}, body); "close" (the socket, at once).
    asked: Counter of the prompts that were answered. requests: (path, headers, body) of each.
    """

    def __init__(self, rule=lambda prompt: 50, script=()):
        self.rule, self.script = rule, list(script)
        self.asked, self.requests, self.lock = Counter(), [], threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with fake.lock:
                    fake.requests.append((self.path, dict(self.headers), body.decode()))
                    step = fake.script.pop(0) if fake.script else "ok"
                fake.answer(self, step, json.loads(body or "{}"))

            do_GET = do_POST  # what a client would send that followed a redirect

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        serve = self.server.serve_forever
        self.thread = threading.Thread(target=serve, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler, step, request):
        if step == "close":
            handler.close_connection = True
            return
        if step == "ok":
            step = 200, {}, json.dumps(self.completion(request["messages"][-1]["content"]))
        status, headers, body = step if isinstance(step, tuple) else (step, {}, "")
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    def completion(self, prompt):
        first = self.rule(prompt)
        top = first if isinstance(first, dict) else {str(first): 1.0}
        tokens = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        with self.lock:
            self.asked[prompt] += 1
        logprobs = {"content": [{**tokens[0], "top_logprobs": tokens}]}
        return {"choices": [{"message": {"role": "assistant"}, "logprobs": logprobs}]}
