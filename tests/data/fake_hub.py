"""A Hugging Face hub on 127.0.0.1: as much of its HTTP API as datasets and huggingface_hub use to read.

    with FakeHub({"allenai/c4": {"README.md": C4_CARD, "en/c4-train.00000-of-00001.json.gz": data}}) as hub:
        subprocess.run([...], env=hub.environment(tmp_path))

The libraries read ``HF_ENDPOINT`` when they are imported, so the code under test runs in a process of its own.
"""

import json
import os
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.conftest import empty_cache

COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"

C4_CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: en.noblocklist
  data_files:
  - split: train
    path: en.noblocklist/c4-train.*.json.gz
- config_name: zh
  data_files:
  - split: train
    path: multilingual/c4-zh.*.json.gz
  - split: validation
    path: multilingual/c4-zh-validation.*.json.gz
---
# C4
"""

_PAGE = 3
"""Entries of a listing's page: few, so that tests meet several pages."""


class FakeHub:
    """Dataset repositories, each a mapping from path to content, at one commit.

    ``requests`` counts requests by method and path (``GET allenai/c4/en/...`` for files), ``served`` the
    bytes of bodies by path of file.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], *, gated: frozenset[str] = frozenset()) -> None:
        self.repos = repos
        self.gated = gated
        self.requests: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.delay_s = 0.0
        self._failures: list[int | str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment of a process that uses this hub and keeps what it fetches below ``folder``."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "huggingface"),
            "PALMTOP_CACHE": str(empty_cache(folder / "palmtop")),
            "NO_PROXY": "127.0.0.1",
        }
        return {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | own

    def fail(self, *ways: int | str) -> None:
        """Let the next requests for a data file fail, one each: an HTTP status, or ``drop`` half way."""
        self._failures.extend(ways)

    def next_failure(self) -> int | str | None:
        with self._lock:
            return self._failures.pop(0) if self._failures else None

    def count(self, request: str, file: str | None = None, sent: int = 0) -> None:
        with self._lock:
            self.requests[request] += 1
            if file is not None:
                self.served[file] += sent


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3])
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self._tree(match[1], match[2], int(query.get("cursor", ["0"])[0]))
        else:
            self._error(404, "RepoNotFound")

    def _info(self, repo: str) -> None:
        self.hub.count(f"{self.command} info {repo}")
        if repo not in self.hub.repos:
            return self._error(404, "RepoNotFound")
        siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
        return self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, repo: str, folder: str, start: int) -> None:
        self.hub.count(f"{self.command} tree {repo}/{folder}")
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in sorted(self.hub.repos[repo].items()):
            if name.startswith(prefix):
                head, _, below = name.removeprefix(prefix).partition("/")
                entry = {"type": "directory", "size": 0} if below else {"type": "file", "size": len(content)}
                entries[prefix + head] = entry | {"path": prefix + head, "oid": "0" * 40}
        if not entries:
            return self._error(404, "EntryNotFound")
        more = f'<{self.hub.url}{urlsplit(self.path).path}?cursor={start + _PAGE}>; rel="next"'
        page = list(entries.values())[start : start + _PAGE]
        return self._json(page, {"Link": more} if start + _PAGE < len(entries) else {})

    def _file(self, repo: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        status, headers = 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(content)):040x}"'}
        if repo in self.hub.gated:
            return self._error(403, "GatedRepo")
        if content is None:
            return self._error(404, "EntryNotFound" if repo in self.hub.repos else "RepoNotFound")
        body, data_file = content, name.endswith(".gz")
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            status, body = 206, content[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        failure = self.hub.next_failure() if data_file else None
        if isinstance(failure, int):
            self.hub.count(f"{self.command} {repo}/{name}")
            return self._error(failure, "Busy", {"Retry-After": "7"} if failure == 429 else {})
        if data_file:
            time.sleep(self.hub.delay_s)
        sent = body[: len(body) // 2] if failure == "drop" else body
        self.hub.count(f"{self.command} {repo}/{name}", name, len(sent) if self.command == "GET" else 0)
        self._send(status, sent, headers | {"Content-Length": str(len(body))})
        self.close_connection = failure == "drop"
        return None

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT} | (headers or {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
