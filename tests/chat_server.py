"""A local server that speaks OpenAI's chat completions, with whatever faults a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = {"retry-after-ms": "1"}  # so that a client waits no longer in a test


@dataclass
class Reply:
    """What the server sends; with `wait`, only after so many seconds."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0


def completion(text: str | None, refusal: str | None = None, ended: str = "stop", **fields: Any) -> Reply:
    """A chat completion that says a text."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": ended, "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    whole = {"id": "c", "object": "chat.completion", "created": 0, "model": "tiny-2026", "usage": usage}
    return Reply({**whole, "choices": [choice], **fields})


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI's server tells it."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    return Reply({"error": error}, status, {**SOON, **{name.replace("_", "-"): text for name, text in headers.items()}})


class ChatServer:
    """Answers each request with what `reply` says to its body and its number, from 0.

    Attributes:
        requests: the bodies that came.
        keys: the Authorization header of each.
    """

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.reply, self.requests, self.keys = reply, [], []
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self) -> ChatServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys.append(self.headers.get("authorization"))
                found = server.reply(body, number) if self.path == "/v1/chat/completions" else failure(404)
                server.closing.wait(found.wait)
                sent = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
                headers = {"content-type": "application/json", "content-length": str(len(sent)), **found.headers}
                self.send_response(found.status)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_: Any) -> None:
                pass  # a client that waited no longer

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"
