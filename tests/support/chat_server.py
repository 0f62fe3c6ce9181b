"""A chat-completions server for the tests: `python chat_server.py FOLDER`, on a port of its own on loopback.

It writes its port to FOLDER/port and every request to FOLDER/requests.jsonl. FOLDER/plan.json is what it does next: a
list of "429", "500", "401", "hang", "prose", "html", "empty" or [status, body], each for one request; after them it
answers as asked.

As a judge it is an oracle for marked words: one concept covers excerpts whose marked words begin with the same letter.
The model "other" gives the opposite score, 6 - score.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])


def answer(question: str, model: str) -> str:
    excerpts = [line for line in question.splitlines() if re.match(r"\d+\. ", line)]
    letters = [re.findall(r"<<(.*?)>>", line)[-1][:1] for line in excerpts]
    if '"score"' in question:
        letter, share = Counter(letters).most_common(1)[0]
        score = 5 if share == len(letters) else 1
        said = {"explanation": f"words in {letter}", "score": 6 - score if model == "other" else score}
        return f"Here you are:\n```json\n{json.dumps(said)}\n```"
    letter = re.findall(r"words in (.)", question)[0]
    return json.dumps({"strong": [i for i, found in enumerate(letters, 1) if found == letter]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen = {"path": self.path, "key": self.headers["Authorization"], "body": body}
        with (FOLDER / "requests.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        plan = json.loads((FOLDER / "plan.json").read_text())
        mode = plan.pop(0) if plan else "ok"
        (FOLDER / "plan.json").write_text(json.dumps(plan))
        if mode in ("429", "500", "401"):
            message = {"error": {"message": f"no: {self.headers['Authorization']}"}}
            return self.reply(int(mode), json.dumps(message), {"retry-after-ms": "10"})
        if mode == "hang":
            time.sleep(3)
            return None
        if isinstance(mode, list):
            return self.reply(*mode)
        if mode in ("html", "empty"):
            return self.reply(200, "<p>hello</p>" if mode == "html" else json.dumps({"choices": []}))
        question = body["messages"][0]["content"]
        said = "I would rather not say." if mode == "prose" else answer(question, body["model"])
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        found: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return self.reply(200, json.dumps({**found, "choices": [choice], "usage": usage}))

    def reply(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if text.startswith("<") else "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    (FOLDER / "port.part").write_text(str(server.server_port))
    (FOLDER / "port.part").rename(FOLDER / "port")
    server.serve_forever()
