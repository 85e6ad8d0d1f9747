"""The page in a real browser: it streams, stops, compares, clears, fits a phone, and asks no other machine."""

import re
import time

import pytest
from browser import chromium, watched
from scripted import scripted_models

pytest.importorskip("gradio", reason="the chat app needs Gradio")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of an app whose tuned model writes capitals for ever, its base small letters once; and both."""
    from minigpt_lib.chat import build_app, launch

    models = scripted_models(tmp_path_factory.mktemp("app"), base="abcdefghij.", tuned=LETTERS, pause=0.03)
    app = build_app(models)
    yield launch(app, 0, block=False), models
    app.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, served):
    page, complaints = watched(browser)
    page.goto(served[0])
    page.locator("#message textarea").wait_for()
    yield page
    page.context.close()
    assert complaints == []


def send(page, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#send").click()


def reply(page) -> str:
    """The text of the last reply on the page."""
    bubbles = page.locator("#talk .bot .message, #talk .message.bot")
    return bubbles.last.inner_text().strip() if bubbles.count() else ""


def expect(page, what, seconds: float = 60) -> None:
    """Wait until what(page) holds."""
    end = time.monotonic() + seconds
    while not what(page):
        assert time.monotonic() < end, f"never came true: {page.locator('body').inner_text()[:800]}"
        page.wait_for_timeout(30)


def set_new_tokens(page, n: int) -> None:
    if not page.get_by_label("number input for New tokens").is_visible():
        page.get_by_text("Settings", exact=True).click()
    box = page.get_by_label("number input for New tokens")
    box.fill(str(n))
    box.press("Tab")


def still(models) -> bool:
    """Does the model stand still?"""
    calls = models.tuned.calls + models.base.calls
    time.sleep(0.5)
    return calls == models.tuned.calls + models.base.calls


def test_a_reply_streams_in_and_its_cost_is_shown(page, served):
    set_new_tokens(page, 40)
    send(page, "Hello")
    seen = []
    page.locator("#stop").wait_for()
    while not page.locator("#send").is_visible():
        seen.append(reply(page))
        page.wait_for_timeout(30)
    expect(page, lambda p: reply(p) == (LETTERS * 2)[:40])
    assert len({len(text) for text in seen}) > 5, "the reply came in one piece"
    assert all(reply(page).startswith(text) for text in seen if text.isupper())
    status = page.locator("#status").inner_text()
    assert re.search(
        r"40 tokens · \d+ tokens/s with the cache on · first after [\d.]+ s · \d+ of 512 positions", status
    )
    assert page.locator("#message textarea").input_value() == ""


def test_stop_frees_the_worker_and_the_conversation_goes_on(page, served):
    set_new_tokens(page, 400)
    send(page, "Go")
    expect(page, lambda p: len(reply(p)) > 5)
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    expect(page, lambda p: still(served[1]), 10)
    stopped = reply(page)
    assert 5 < len(stopped) < 300
    set_new_tokens(page, 6)
    send(page, "And again")
    expect(page, lambda p: reply(p) == LETTERS[:6])
    assert page.locator("#talk").inner_text().count("Go") == 1 and stopped in page.locator("#talk").inner_text()


def test_closing_the_page_frees_the_worker(browser, served):
    page, _ = watched(browser)
    page.goto(served[0])
    set_new_tokens(page, 450)
    send(page, "Go")
    expect(page, lambda p: len(reply(p)) > 5)
    page.context.close()
    end = time.monotonic() + 10
    while not still(served[1]):
        assert time.monotonic() < end, "the model goes on writing for nobody"


def test_examples_retry_and_clear(page):
    set_new_tokens(page, 5)
    assert page.locator("#retry").is_disabled()
    page.get_by_role("button", name="Who are you?").click()
    expect(page, lambda p: reply(p) == LETTERS[:5])
    assert not page.locator("#examples").is_visible()
    set_new_tokens(page, 7)
    page.locator("#retry").click()
    expect(page, lambda p: reply(p) == LETTERS[:7])
    assert page.locator("#talk").inner_text().count("Who are you?") == 1
    page.locator("#clear").click()
    expect(page, lambda p: p.locator("#examples").is_visible())
    assert reply(page) == "" and page.locator("#status").inner_text().strip() == ""


def test_clear_in_the_middle_of_a_reply_stops_it(page, served):
    set_new_tokens(page, 400)
    send(page, "Go")
    expect(page, lambda p: len(reply(p)) > 5)
    page.locator("#clear").click()
    expect(page, lambda p: p.locator("#send").is_visible() and reply(p) == "")
    expect(page, lambda p: still(served[1]), 10)


def test_side_by_side_shows_both_models_at_once(page):
    set_new_tokens(page, 20)
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#prompt textarea").fill("Hello")
    page.locator("#ask").click()
    expect(page, lambda p: "abc" in p.locator("#base").inner_text() and "ABC" in p.locator("#tuned").inner_text())
    expect(page, lambda p: p.locator("#ask").is_visible())
    assert page.locator("#base").inner_text().startswith("abcdefghij.")
    assert page.locator("#tuned").inner_text().startswith(LETTERS[:20])
    assert "12 tokens" in page.locator("#base").inner_text() and "20 tokens" in page.locator("#tuned").inner_text()


def test_side_by_side_stops(page, served):
    set_new_tokens(page, 400)
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#prompt textarea").fill("Hello")
    page.locator("#ask").click()
    expect(page, lambda p: "ABCD" in p.locator("#tuned").inner_text())
    page.locator("#stop-both").click()
    page.locator("#ask").wait_for()
    expect(page, lambda p: still(served[1]), 10)


def test_what_people_write_is_shown_as_text(page):
    set_new_tokens(page, 4)
    evil = (
        '<img src="http://evil.example/x.png" onerror="alert(1)"><b>bold</b> <script>alert(2)</script>\n# *stars* $x$'
    )
    send(page, evil)
    expect(page, lambda p: reply(p) == LETTERS[:4])
    shown = page.locator("#talk").inner_text()
    for line in evil.splitlines():
        assert line in shown
    assert page.locator("#talk img[src*=evil], #talk script, #talk .message b").count() == 0


def test_a_bad_message_says_why_and_stays(page):
    send(page, "   ")
    expect(page, lambda p: "empty" in p.locator("#status").inner_text())
    send(page, "x" * 3000)
    expect(page, lambda p: "3017 tokens" in p.locator("#status").inner_text())
    assert page.locator("#message textarea").input_value() == "x" * 3000


def test_enter_sends_and_a_second_enter_waits(page):
    set_new_tokens(page, 30)
    box = page.locator("#message textarea")
    box.fill("First")
    box.press("Enter")
    page.locator("#stop").wait_for()
    box.fill("Second")
    box.press("Enter")
    expect(page, lambda p: len(reply(p)) == 30)
    talk = page.locator("#talk").inner_text()
    assert "First" in talk and "Second" not in talk


def test_the_seed_is_empty_and_the_cache_is_on_to_begin_with(page):
    page.get_by_text("Settings", exact=True).click()
    assert page.get_by_label("Seed").input_value() == ""
    cache = page.get_by_label("KV cache")
    assert cache.is_checked()
    cache.uncheck()
    set_new_tokens(page, 5)
    send(page, "Hello")
    expect(page, lambda p: "cache off" in p.locator("#status").inner_text())


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")])
def test_the_page_is_light_and_fits_every_width(browser, served, width, scheme):
    page, complaints = watched(browser, width, 800, color_scheme=scheme)
    page.goto(served[0])
    page.locator("#message textarea").wait_for()
    send(page, "A long word: " + "x" * 200)
    expect(page, lambda p: len(reply(p)) > 20)
    for tab in ("Side by side", "Chat"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{tab} scrolls sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(map(int, re.findall(r"\d+", background)[:3])) > 230
    for name in ("#message textarea", "#talk", "#clear"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 40
    page.locator("#clear").click()
    assert page.locator("#message textarea").bounding_box()["y"] < 800  # the box is in sight without scrolling
    page.context.close()
    assert complaints == []


def test_two_readers_at_once_do_not_meet(browser, served):
    pages = [watched(browser)[0] for _ in range(2)]
    for n, page in enumerate(pages):
        page.goto(served[0])
        set_new_tokens(page, 30)
        send(page, f"I am reader {n}")
    for n, page in enumerate(pages):
        expect(page, lambda p: len(reply(p)) == 30)
        talk = page.locator("#talk").inner_text()
        assert f"reader {n}" in talk and f"reader {1 - n}" not in talk
        page.context.close()
