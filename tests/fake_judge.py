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
    HTTP status, or (status, {header: value}), or (status, {...}, body); "hang" (no answer until
    the server closes), "drip" (a byte of the body every 20 ms, for ever), "drip_header" (the same
    within a header), "endless" (a body as fast as it is read, for ever), "close" (the socket, at
    once), "cut" (in the middle of the body), "garbage" (no JSON), "empty" (JSON, but no
    completion), "no_logprobs". After the script all is well.
    asked: Counter of the prompts that were answered. requests: (path, headers, body) of every
    request, answered or not. sent: bytes of "endless" that went out.
    """

    def __init__(self, rule=lambda prompt: 50, script=()):
        self.rule, self.script = rule, list(script)
        self.asked, self.requests, self.sent = Counter(), [], 0
        self.lock, self.closing = threading.Lock(), threading.Event()
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

            def handle_error(self, request, client_address):
                pass  # a client that has hung up on us is no news

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        serve = self.server.serve_forever
        self.thread = threading.Thread(target=serve, kwargs={"poll_interval": 0.01})
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
        if step in ("drip", "drip_header", "endless"):
            self.never_end(handler, step)
            return
        status, headers, body = 200, {}, ""
        if step == "garbage":
            body = "<html>Bad gateway</html>"
        elif step == "empty":
            body = json.dumps({"error": {"message": "overloaded"}})
        elif step in ("ok", "no_logprobs", "cut"):
            body = json.dumps(self.completion(request, with_logprobs=step != "no_logprobs"))
        else:
            given = step if isinstance(step, tuple) else (step,)
            status = given[0]
            headers = given[1] if len(given) > 1 else {}
            body = given[2] if len(given) > 2 else ""
        handler.send_response(status)
        length = {"Content-Type": "application/json", "Content-Length": str(len(body.encode()))}
        for name, value in {**length, **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode()[: len(body) // 2 if step == "cut" else None])

    def never_end(self, handler, step):
        handler.send_response(200)
        if step == "drip_header":
            handler.flush_headers()
            handler.wfile.write(b"X-Slow: ")
        else:
            handler.end_headers()
        piece, pause = (b" " * 65536, 0) if step == "endless" else (b" ", 0.02)
        while not self.closing.wait(pause):
            handler.wfile.write(piece)
            self.sent += len(piece)

    def completion(self, request, with_logprobs):
        prompt = request["messages"][-1]["content"]
        first = self.rule(prompt)
        top = first if isinstance(first, dict) else {str(first): 1.0}
        ranked = sorted(top.items(), key=lambda pair: -pair[1])[: request["top_logprobs"]]
        tokens = [
            {"token": token, "logprob": math.log(p), "bytes": list(token.encode())}
            for token, p in ranked
        ]
        logprobs = None
        if with_logprobs:
            logprobs = {"content": [{**tokens[0], "top_logprobs": tokens}]}
            with self.lock:
                self.asked[prompt] += 1
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": ranked[0][0]},
            "logprobs": logprobs,
        }
        model = request["model"]
        return {"id": "0", "object": "chat.completion", "model": model, "choices": [choice]}
