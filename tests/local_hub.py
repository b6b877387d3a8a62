"""As much of the Hugging Face hub as pushing a model and loading it takes, on this machine and in memory."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tag_of(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Its repositories are files by name, and every file is of the kind that a commit holds whole."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, api, *words = self.path.split("/")
        if words[:2] == ["repos", "create"]:
            name = "{organization}/{name}".format(**json.loads(body))
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}"})
        elif "preupload" in words:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif "commit" in words:
            name = "/".join(words[1:3])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})

    def do_GET(self) -> None:
        _, *words = unquote(self.path.partition("?")[0]).split("/")
        is_file = "resolve" in words
        name = "/".join(words[:2] if is_file else words[2:4])
        files = self.server.repositories.get(name)
        if files is None or (is_file and "/".join(words[4:]) not in files):
            code = "EntryNotFound" if files else "RepoNotFound"
            self.answer({"error": "not found"}, 404, X_Error_Code=code)
        elif is_file:
            content = files["/".join(words[4:])]
            self.answer(content, ETag=f'"{tag_of(content)}"', X_Repo_Commit=COMMIT)
        elif "tree" in words:
            facts = [{"path": file, "size": len(content), "oid": tag_of(content)} for file, content in files.items()]
            self.answer([{"type": "file"} | of_file for of_file in facts])
        else:
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})

    do_HEAD = do_GET


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
