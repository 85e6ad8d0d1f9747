"""A headless Chromium for the tests of the page; it notes everything that a reader should not have to see."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator:
    """A browser; skips with a reason where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need Playwright")
    if CHROMIUM is None:
        pytest.skip("the browser tests need Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def watched(browser, width: int = 1280, height: int = 800, **settings) -> tuple:
    """A new page in a session of its own, and the list of complaints that grows while it is used."""
    page = browser.new_context(viewport={"width": width, "height": height}, **settings).new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
    page.on("console", lambda m: complaints.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("response", lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def beyond(request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.hostname != "127.0.0.1":
            complaints.append(f"a request to {url.hostname}: {request.url}")

    page.on("request", beyond)
    page.on("websocket", lambda socket: complaints.append(f"a websocket to {socket.url}"))
    return page, complaints
