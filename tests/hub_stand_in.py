"""A server on this machine that answers huggingface_hub's calls for an upload as the hub does, and keeps what arrives.

create repository -> check of the card's metadata -> preupload (which file goes where) -> LFS batch -> PUT -> commit
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_of_alice"


class Hub:
    """repositories: by name, visibility and files (path -> content) of each. requests: method and path, in order.

    down: path prefixes that are answered by 503.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.messages: list[str] = []
        self.down: tuple[str, ...] = ()
        self.address = ""


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer("GET")

        def do_POST(self):
            self._answer("POST")

        def do_PUT(self):
            self._answer("PUT")

        def _answer(self, method: str) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{method} {path}")
            body = self._body()
            if path.startswith(hub.down) and hub.down:
                return self._send(503, {"error": "overloaded"})
            if method == "PUT":  # to the storage, whose addresses are signed
                hub.stored[path.rpartition("/")[2]] = body
                return self._send(200, {})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, {"error": "Invalid username or password."})
            return self._send(*respond(hub, path, body))

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, code: int, answer: dict) -> None:
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def respond(hub: Hub, path: str, body: bytes) -> tuple[int, dict]:
    """Return status and answer."""
    if path == "/api/repos/create":
        return create(hub, json.loads(body))
    if path == "/api/validate-yaml":
        return validate(json.loads(body)["content"])
    name = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)", path)[1]
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    if path == f"/api/models/{name}":
        return 200, {"id": name, "siblings": []}
    if path == f"/api/models/{name}/preupload/main":
        modes = [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": mode(file["path"]), "oid": None}
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}
    if path == f"/{name}.git/info/lfs/objects/batch":
        objects = [
            wanted | {"actions": {"upload": {"href": f"{hub.address}/storage/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    if path == f"/api/models/{name}/commit/main":
        return commit(hub, name, [json.loads(line) for line in body.splitlines()])
    return 404, {"error": f"no such call: {path}"}


def create(hub: Hub, wanted: dict) -> tuple[int, dict]:
    owner = wanted["organization"] or "alice"
    if owner != "alice":
        return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}."}
    name = f"{owner}/{wanted['name']}"
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", "url": f"{hub.address}/{name}"}
    hub.repositories[name] = {"visibility": wanted.get("visibility", "public"), "files": {}}
    return 200, {"url": f"{hub.address}/{name}", "name": name}


def validate(content: str) -> tuple[int, dict]:
    """Check the parts of the metadata that the hub checks: a base model or data set is a name of the hub."""
    metadata = yaml.safe_load(content.split("---\n")[1])
    names = [metadata.get("base_model", "a/b"), *metadata.get("datasets", [])]
    errors = [{"message": f'"{name}" must be a valid repository'} for name in names if name.count("/") > 1]
    return (400 if errors else 200), {"errors": errors, "warnings": []}


def mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png", "tokenizer.json")) else "regular"


def commit(hub: Hub, name: str, lines: list[dict]) -> tuple[int, dict]:
    files = hub.repositories[name]["files"]
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            hub.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = hub.stored[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            files[value["path"]] = content
    oid = "0" * 40
    return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{name}/commit/{oid}"}
