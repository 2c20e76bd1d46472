"""A server on loopback that speaks as much of the hub's protocol as its clients ask for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Revision:
    """The files of a repository at a branch or tag.

    Attributes:
        kind: ``models`` or ``datasets``.
        name: ``owner/name``.
        branch: The branch or tag.
        folder: Where its files are.
    """

    kind: str
    name: str
    branch: str
    folder: Path

    @property
    def commit(self) -> str:
        return hashlib.sha1(f"{self.kind}/{self.name}@{self.branch}".encode()).hexdigest()

    def entry(self, path: Path) -> dict[str, Any]:
        """A file or folder, as the hub lists it."""
        name = path.relative_to(self.folder).as_posix()
        found = {"path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
        if path.is_dir():
            return {"type": "directory", **found}
        return {"type": "file", **found, "size": path.stat().st_size}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    revisions: list[Revision]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        _, api, kind, *parts = path.split("/")
        if api == "api":
            self.listing(kind, "/".join(parts[:2]), parts[2:])
        elif "/resolve/" in path:
            place, _, rest = path.partition("/resolve/")
            kind = "datasets" if place.startswith("/datasets/") else "models"
            branch, _, file = rest.partition("/")
            self.file(kind, place.removeprefix("/datasets").strip("/"), branch, file)
        else:
            self.missing("EntryNotFound")

    def found(self, kind: str, name: str, branch: str) -> Revision | None:
        """The revision; if there is none, that has been answered."""
        own = [one for one in self.revisions if (one.kind, one.name) == (kind, name)]
        for one in own:
            if branch in (one.branch, one.commit):
                return one
        self.missing("RevisionNotFound" if own else "RepoNotFound")
        return None

    def listing(self, kind: str, name: str, asked: list[str]) -> None:
        one = self.found(kind, name, asked[1] if asked else "main")
        if one is None:
            return
        everything = "recursive=true" in self.path or asked[:1] != ["tree"]
        below = one.folder / "/".join(asked[2:])
        entries = [one.entry(p) for p in sorted(below.glob("**/*" if everything else "*"))]
        if asked[:1] == ["tree"]:
            self.send_json(entries)
            return
        files = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
        self.send_json({"id": name, "sha": one.commit, "siblings": files})

    def file(self, kind: str, name: str, branch: str, file: str) -> None:
        one = self.found(kind, name, branch)
        if one is None:
            return
        path = one.folder / file
        if not path.is_file():
            self.missing("EntryNotFound")
            return
        data = path.read_bytes()
        tag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": one.commit}
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first or self.command == "HEAD":
            self.send(200, data, headers)
            return
        part = data[int(first) : int(last or len(data)) + 1]
        end = int(first) + len(part) - 1
        headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        self.send(206, part, headers)

    def missing(self, code: str) -> None:
        self.send(404, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def send_json(self, data: Any) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(revisions: list[Revision]) -> Iterator[str]:
    """The address of a server of these repositories, on loopback."""
    handler = type("OfThese", (Handler,), {"revisions": revisions})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
