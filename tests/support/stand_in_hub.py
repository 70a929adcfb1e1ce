"""A stand-in for the Hugging Face Hub on the loopback interface, as far as uploads need it."""

import base64
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def hub_environment(home: Path) -> dict[str, str]:
    """Environment with a made-up token, and without settings of this machine's user."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "HF_HOME": str(home), "HF_TOKEN": "hf_madeup", "HF_HUB_DISABLE_XET": "1"}


class StandInHub:
    """Accepts one repository and one commit, and keeps what arrived.

    `refuses`: "commit" or "weights", which are then a large file, uploaded before the commit.
    """

    def __init__(self, home: Path) -> None:
        hub = self
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = ""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(hub.post(self.path, body))

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(None)

            def do_GET(self) -> None:
                self.answer(None)

            def answer(self, value: Any) -> None:
                content = json.dumps(value or {}).encode()
                self.send_response(404 if value is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.commit_url = f"{self.address}/someone/tiny/commit/1"
        self.environment = hub_environment(home) | {"HF_ENDPOINT": self.address}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def post(self, path: str, body: bytes) -> Any:
        """The answer to one request; None: no such address."""
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.address}/someone/tiny"}
        if path == "/api/models/someone/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"model.safetensors": "lfs"} if self.refuses == "weights" else {}
            answers = [{"path": n, "uploadMode": modes.get(n, "regular")} for n in names]
            return {"files": [{**answer, "shouldIgnore": False} for answer in answers]}
        if path == "/someone/tiny.git/info/lfs/objects/batch":
            upload = {"upload": {"href": f"{self.address}/storage"}}
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [{**o, "actions": upload} for o in objects]}
        if path == "/api/models/someone/tiny/commit/main" and self.refuses != "commit":
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.files[item["value"]["path"]] = content
            return {"commitUrl": self.commit_url, "commitOid": "1", "success": True}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        return None
