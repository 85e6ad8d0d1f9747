"""A web server on the loopback interface that can be told to misbehave."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class File:
    """What the server sends for one path, and how it fails at it."""

    body: bytes = b""
    status: int = 200
    kind: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # the k-th answer ends after so many bytes
    stalls: list[int] = field(default_factory=list)  # the k-th answer falls silent after so many bytes
    claim: int | None = None  # a Content-Length other than the truth
    ranges: bool = True  # whether it honours Range
    grain: int = 1  # its ranges begin at a multiple of this
    to: str | None = None  # redirect


class Server:
    """`files` by path; `requests` lists (method, path, the Range asked for)."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""
        self.over = threading.Event()

    def gets(self, path: str) -> list[str | None]:
        """The ranges that were asked for in downloads of a path."""
        return [wanted for method, asked, wanted in self.requests if (method, asked) == ("GET", path)]


@contextmanager
def serve() -> Iterator[Server]:
    """A server for the `with` block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range")
            nth = len(server.gets(path))
            server.requests.append((self.command, path, wanted))
            file = server.files.get(path, File(b"nothing here", 404, "text/plain"))
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "") if file.ranges and file.status == 200 else None
            start, size = int(found[1]) // file.grain * file.grain if found else 0, len(file.body)
            body = file.body[start:]
            beyond = found and start >= size
            self.send_response(302 if file.to else 416 if beyond else 206 if found else file.status)
            if file.to:
                self.send_header("Location", file.to)
            if found:
                last = f"bytes {start}-{size - 1}/{size}"
                self.send_header("Content-Range", f"bytes */{size}" if beyond else last)
            body = b"" if file.to or beyond else body
            self.send_header("Content-Type", file.kind)
            self.send_header("Content-Length", str(len(body) if file.claim is None else file.claim))
            for name, value in file.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = file.cuts[nth] if nth < len(file.cuts) else None
            stall = file.stalls[nth] if nth < len(file.stalls) else None
            try:
                self.wfile.write(body[: cut if stall is None else stall])
                self.wfile.flush()
                if stall is not None:
                    server.over.wait(30)
            except OSError:
                pass  # the client has gone
            if cut is not None or stall is not None or file.claim is not None:
                self.close_connection = True

        do_GET = do_HEAD = answer

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
        time.sleep(0)
