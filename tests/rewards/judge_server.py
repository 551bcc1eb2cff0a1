"""A server on this machine that plays a judge, over real HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import pytest


class Server(ThreadingHTTPServer):
    """Answers the nth request with `replies[n]`, then always with the last: text of the model, or (status, headers, body).

    requests: what it was sent. most: most requests at a time. hold: an event without which it answers nothing.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.keys, self.now, self.most, self.hold = ["Score: 1"], [], [], 0, 0, None
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_) -> None:
        """A client that does not wait is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append((self.path, self.headers["Authorization"]))
            reply = server.replies[min(len(server.requests), len(server.replies)) - 1]
            server.now += 1
            server.most = max(server.most, server.now)
        if server.hold is not None:
            server.hold.wait()
        if reply == "hang":
            server.ended.wait()
            return
        with server.lock:
            server.now -= 1
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            reply = (200, {}, json.dumps(completion | {"choices": [choice]}))
        status, headers, text = reply
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def judge_server():
    server = Server()
    yield server
    import_module("mssr.rewards.builtin.judge")._judge.cache_clear()  # clients of event loops that have ended
    server.ended.set()
    server.shutdown()
    server.server_close()
