"""An OpenAI-compatible chat endpoint on 127.0.0.1 that answers by a rule, with log-probabilities, and misbehaves on order."""
import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeJudge:
    """`with FakeJudge(rule) as judge`: serves judge.url, a base URL.

    rule(prompt) gives the first token: a number or a word, or {token: probability}. script: what the first requests meet, in the
    order of their arrival, one entry each: "ok"; an HTTP status, or (status, {header: value}), or (status, {...}, body);
    "hang" (no answer until the server closes), "close" (the socket, at once), "cut" (in the middle of the body), "garbage" (no
    JSON), "empty" (JSON, but no completion), "no_logprobs". After the script all is well.
    asked: Counter of the prompts that were answered. requests: (path, headers, body) of every request, answered or not.
    """

    def __init__(self, rule=lambda prompt: 50, script=()):
        self.rule, self.script = rule, list(script)
        self.asked, self.requests, self.lock, self.closing = Counter(), [], threading.Lock(), threading.Event()
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

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # callers beyond it would wait a second for their connection

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler, step, request):
        if step == "hang":
            self.closing.wait()
        if step in ("hang", "close"):
            handler.close_connection = True
            return
        status, headers, body = 200, {}, ""
        if step == "garbage":
            body = "<html>Bad gateway</html>"
        elif step == "empty":
            body = json.dumps({"error": {"message": "overloaded"}})
        elif step in ("ok", "no_logprobs", "cut"):
            body = json.dumps(self.completion(request, with_logprobs=step != "no_logprobs"))
        else:
            step = step if isinstance(step, tuple) else (step,)
            status, headers, body = step + ({}, "")[len(step) - 1:]
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body.encode())), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode()[:len(body) // 2 if step == "cut" else None])

    def completion(self, request, with_logprobs):
        prompt = request["messages"][-1]["content"]
        first = self.rule(prompt)
        top = first if isinstance(first, dict) else {str(first): 1.0}
        ranked = sorted(top.items(), key=lambda pair: -pair[1])[:request["top_logprobs"]]
        tokens = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in ranked]
        with self.lock:
            self.asked[prompt] += with_logprobs
        return {"id": "chatcmpl-0", "object": "chat.completion", "model": request["model"], "choices": [{
            "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": ranked[0][0]},
            "logprobs": {"content": [{**tokens[0], "top_logprobs": tokens}]} if with_logprobs else None}]}
