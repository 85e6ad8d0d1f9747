"""The guard before the chat server: other pages, rebound names, large and unfinished bodies, closed doors, relaunch."""

import asyncio
import gc
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from scripted import scripted_models

import minigpt_lib
from minigpt_lib.chat.app import build_app, launch
from minigpt_lib.chat.guard import LOOPBACK, MAX_BODY, Guard

pytest.importorskip("gradio", reason="the chat app needs Gradio")
GREEDY = (0, 0, 1, 40, True, "")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a running app over scripted models, and the models."""
    models = scripted_models(tmp_path_factory.mktemp("app"), base="abc.", tuned="ABC.")
    app = build_app(models)
    yield launch(app, 0, block=False), models
    app.close(verbose=False)


def client(address):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False)


def answers(address: str) -> bool:
    """Does an honest reader get an answer?"""
    return client(address).predict("Hello", *GREEDY, api_name="/chat")[1][-1]["content"] == "ABC."


def ask(address: str, method: str = "GET", path: str = "/", body: bytes | None = None, **headers: str):
    """Status, headers and text of one request, its headers written as they are."""
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


# --- the rules by themselves


@pytest.mark.parametrize(
    ("hosts", "host", "known"),
    [
        (LOOPBACK, "127.0.0.1:7860", True), (LOOPBACK, "localhost:7860", True), (LOOPBACK, "[::1]:7860", True),
        (LOOPBACK, "LOCALHOST", True), (LOOPBACK, "evil.example:7860", False), (LOOPBACK, "", False),
        (LOOPBACK, "127.0.0.1.evil.example", False), (LOOPBACK, "localhost.", False), (LOOPBACK, "[::1", False),
        (LOOPBACK, "evil.example@127.0.0.1x", False), (LOOPBACK, "0.0.0.0:7860", False),
        (("192.168.1.5",), "192.168.1.5:7860", True), (("192.168.1.5",), "192.168.1.6:7860", False),
        (("0.0.0.0",), "192.168.1.5:7860", True), (("0.0.0.0",), "evil.example:7860", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_served(hosts, host, known):
    refused = Guard(None, hosts).refusal("/", {"host": host})
    assert (refused is None) == known and (known or refused[0] == 403)


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        ({}, True), ({"origin": "http://127.0.0.1:7860"}, True), ({"origin": "https://127.0.0.1:7860"}, True),
        ({"origin": "http://friend.example"}, True), ({"origin": "http://127.0.0.1:8888"}, False),
        ({"origin": "http://localhost:7860"}, False), ({"origin": "null"}, False), ({"origin": ""}, False),
        ({"origin": "http://evil.example"}, False), ({"origin": "http://127.0.0.1:7860.evil.example"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),  # a link, or a notebook's frame
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, True),
    ],
)  # fmt: skip
def test_only_this_page_and_named_ones_may_ask(headers, served):
    guard = Guard(None, origins=["http://friend.example"])
    assert (guard.refusal("/gradio_api/queue/join", {"host": "127.0.0.1:7860"} | headers) is None) == served


def run_guard(messages: list[dict], method: str = "POST") -> tuple[list[dict], list[bytes]]:
    """What the guard sends for a body that comes in these pieces, and the bodies that reach the app behind it."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    coming = iter(messages)

    async def receive():
        return next(coming, None) or await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app)(scope, receive, send))
    return sent, reached


def test_a_body_is_handed_on_whole_and_refused_beyond_the_limit():
    def piece(n, more):
        return {"type": "http.request", "body": b"x" * n, "more_body": more}

    sent, reached = run_guard([piece(MAX_BODY - 1, True), piece(1, False)])
    assert sent[0]["status"] == 200 and [len(body) for body in reached] == [MAX_BODY]
    sent, reached = run_guard([piece(MAX_BODY, True), piece(1, True), piece(10**9, False)])  # the rest is never read
    assert sent[0]["status"] == 413 and reached == []


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("minigpt_lib.chat.guard.BODY_SECONDS", 0.1)
    sent, reached = run_guard([{"type": "http.request", "body": b"x", "more_body": True}])
    assert sent[0]["status"] == 408 and reached == []


def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None)({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# --- the running server


def test_another_origin_a_rebound_name_and_a_simple_post_are_refused(served):
    address, _ = served
    host = urlsplit(address).netloc
    join, body = "/gradio_api/queue/join", json.dumps({"data": [], "fn_index": 0, "session_hash": "x"}).encode()
    assert ask(address)[0] == 200 and ask(address, Origin=address)[0] == 200
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x", "/gradio_api/app_id"):
        assert ask(address, path=path, Origin="http://evil.example")[0] == 403
        assert ask(address, path=path, Host="evil.example:" + host.split(":")[1])[0] == 403
    status, headers, _ = ask(address, "POST", join, body, Origin="http://evil.example", Content_Type="text/plain")
    assert status == 403  # without a preflight, as a form sends it
    assert ask(address, "POST", join, body, Origin="null", Content_Type="text/plain")[0] == 403
    rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert ask(address, "POST", join, body, Content_Type="application/json", **rebound)[0] == 403
    assert answers(address)


def test_nothing_is_uploaded_and_no_conversation_reaches_the_disk(served):
    address, _ = served
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(__import__("tempfile").gettempdir()) / "gradio")
    before = set(folder.rglob("*")) if folder.exists() else set()
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\ny\r\n--b--\r\n'
    kind = {"Content_Type": "multipart/form-data; boundary=b"}
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload/", "/gradio_api/deep_link?session_hash=x",
                 "/gradio_api/component_server/", "/gradio_api/component_server", "/gradio_api/file=/etc/passwd",
                 "/gradio_api/proxy=http://evil.example/"):
        for headers in ({}, {"Origin": "http://evil.example"}):
            assert ask(address, "POST", path, part, **kind, **headers)[0] == (403 if headers else 404)
            assert ask(address, "GET", path, **headers)[0] == (403 if headers else 404)
    assert (set(folder.rglob("*")) if folder.exists() else set()) == before


def test_only_pages_of_this_machine_may_frame_the_app(served):
    headers = {name.lower(): value for name, value in ask(served[0])[1].items()}
    ancestors = headers["content-security-policy"].split()
    assert ancestors == ["frame-ancestors", "'self'", "http://127.0.0.1:*", "http://localhost:*"]
    assert headers["x-content-type-options"] == "nosniff"


def test_sixty_megabytes_are_refused_before_they_are_read(served):
    address, _ = served
    url = urlsplit(address)
    begin, head = time.monotonic(), f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {url.netloc}\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=10) as s:
        s.sendall(f"{head}Content-Length: 60000000\r\n\r\n".encode())
        assert s.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((url.hostname, url.port), timeout=10) as s:  # in chunks, its length not announced
        s.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        s.sendall((b"%x\r\n" % 600_000 + b"x" * 600_000 + b"\r\n") * 2)
        assert s.recv(100).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - begin < 10 and answers(address)


def test_half_sent_posts_and_unread_requests_leave_an_honest_reader_his_turn(served):
    """64 posts that stop in the middle, 64 requests whose answers nobody reads: 128 sockets, a few seconds."""
    address, models = served
    url, held, memory = urlsplit(address), [], []
    head = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 1000\r\n\r\n{{"
    assert answers(address)
    for _ in range(2):
        gc.collect()
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc").exists() else 0)
        try:
            for text in [head] * 64 + [f"GET /config HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n"] * 64:
                s = socket.create_connection((url.hostname, url.port), timeout=10)
                s.sendall(text.encode())
                held.append(s)
            begin = time.monotonic()
            assert answers(address) and time.monotonic() - begin < 30
        finally:
            for s in held:
                s.close()
            held.clear()
    assert answers(address)
    gc.collect()
    if memory[0]:
        now = int(Path("/proc/self/statm").read_text().split()[1])
        assert now < 1.1 * memory[1], (memory, now)


def test_other_pages_are_let_in_by_name(tmp_path):
    app = build_app(scripted_models(tmp_path, base="a.", tuned="AB."))
    address = launch(app, 0, block=False, allow_origins=["http://friend.example"])
    try:
        assert ask(address, Origin="http://friend.example")[0] == 200
        assert ask(address, Origin="http://evil.example")[0] == 403
        assert "http://friend.example" in ask(address)[1]["content-security-policy"]
    finally:
        app.close(verbose=False)


# --- launching


def test_a_cell_that_launches_may_be_run_again(tmp_path):
    models = scripted_models(tmp_path, base="a.", tuned="ABC.")
    first = build_app(models)
    try:
        address = launch(first, 0, block=False)
        assert launch(first, 0, block=False) == address and answers(address)  # the same app
        second = build_app(models)  # as when the whole cell is run again
        assert launch(second, int(address.rsplit(":")[-1]), block=False) == address and answers(address)
        assert not first.is_running and second.is_running
        elsewhere = launch(first, 0, block=False)
        assert elsewhere != address and answers(elsewhere) and answers(address)
    finally:
        first.close(verbose=False)
        second.close(verbose=False)


BEHIND = """
import os, sys
from pathlib import Path
from scripted import scripted_models
from minigpt_lib.chat.app import build_app, launch
app = build_app(scripted_models(Path(sys.argv[1]), base="a.", tuned="ABC."))
address = launch(app, 0, block=False)
from gradio_client import Client
print(Client(address, verbose=False).predict("Hi", 0, api_name="/chat")[1][-1]["content"], os.environ["NO_PROXY"])
"""


@pytest.mark.parametrize("before", ["", "example.org"])
def test_the_chat_starts_behind_a_proxy_that_does_not_know_this_machine(tmp_path, before):
    proxy = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")}
    ours = Path(minigpt_lib.__file__).resolve().parents[1]
    env = {k: v for k, v in os.environ.items() if k.upper() != "NO_PROXY"} | proxy
    env |= {"NO_PROXY": before, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ours)])}
    done = subprocess.run([sys.executable, "-c", BEHIND, str(tmp_path)], env=env, capture_output=True, text=True,
                          timeout=180)
    assert done.returncode == 0, done.stderr[-800:]
    told, names = done.stdout.split()
    assert told == "ABC." and names == ",".join([*filter(None, [before]), "127.0.0.1", "localhost"])


