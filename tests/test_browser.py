"""The page in a real browser: it streams, stops, compares, remembers, fits a phone, and asks no other machine."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from browser import chromium, watched
from scripted import TINY, scripted_models, tiny_folder

from minigpt_lib.chat.app import QUEUE, WORKERS
from minigpt_lib.chat.inspect import attention_maps
from minigpt_lib.chat.models import load_models

pytest.importorskip("gradio", reason="the chat app needs Gradio")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of an app whose tuned model writes capitals for ever, its base small letters once; and both."""
    from minigpt_lib.chat.app import build_app, launch

    models = scripted_models(tmp_path_factory.mktemp("app"), base="abcdefghij.", tuned=LETTERS, pause=0.03)
    app = build_app(models)
    yield launch(app, 0, block=False), models
    app.close(verbose=False)


@pytest.fixture(scope="module")
def several_heads(tmp_path_factory):
    """The address of an app over a random model of three layers of two heads, and the models."""
    from minigpt_lib.chat.app import build_app, launch

    torch.manual_seed(0)
    config = replace(TINY, n_layer=3)
    models = load_models(tiny_folder(tmp_path_factory.mktemp("heads") / "tiny", config=config), device="cpu")
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
    opened(page, served[0])
    yield page
    page.context.close()
    assert complaints == []


def opened(page, address: str) -> None:
    """Open the page, and wait until the answer to its first request, what it remembers, is in place."""
    with page.expect_response("**/run/predict*"):
        page.goto(address)
    page.locator("#message textarea").wait_for()
    page.wait_for_timeout(200)


def send(page, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#send").click()


def reply(page) -> str:
    """The text of the last reply on the page."""
    bubbles = page.locator("#talk article.assistant > p")
    return bubbles.last.inner_text().strip() if bubbles.count() else ""


def said(page) -> list[str]:
    """The texts of all messages on the page."""
    return page.locator("#talk article > p").all_inner_texts()


def expect(page, what, seconds: float = 60) -> None:
    """Wait until what(page) holds."""
    end = time.monotonic() + seconds
    while not what(page):
        assert time.monotonic() < end, f"never came true: {page.locator('body').inner_text()[:800]}"
        page.wait_for_timeout(30)


def set_new_tokens(page, n: int) -> None:
    set_number(page, "New tokens", n)


def open_settings(page) -> None:
    """A wide page opens them by itself."""
    if not page.get_by_label("number input for New tokens").is_visible():
        page.get_by_text("Settings", exact=True).click()


def set_number(page, name: str, n: int) -> None:
    box, slider = page.get_by_label(f"number input for {name}"), page.get_by_label(f"range slider for {name}")
    open_settings(page)
    for _ in range(20):  # a page that is still being set up may put its own value back
        box.fill(str(n))
        box.press("Tab")
        page.wait_for_timeout(300)
        if slider.input_value() == box.input_value() == str(n):
            return
    raise AssertionError(f"{name} stays at {slider.input_value()}")


def still(models) -> bool:
    """Does the model stand still?"""
    calls = models.tuned.calls + models.base.calls
    time.sleep(0.5)
    return calls == models.tuned.calls + models.base.calls


def expect_still(models, seconds: float = 10) -> None:
    """Wait until the model stands still."""
    end = time.monotonic() + seconds
    while not still(models):
        assert time.monotonic() < end, "the model goes on writing"


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
        r"40 tokens · \d+ tokens/s with the cache on · first after \d+ ms · \d+ of 512 positions", status
    )
    assert page.locator("#message textarea").input_value() == ""


def test_stop_frees_the_worker_and_the_conversation_goes_on(page, served):
    set_new_tokens(page, 400)
    send(page, "Go")
    expect(page, lambda p: len(reply(p)) > 5)
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    expect_still(served[1])
    stopped = reply(page)
    assert 5 < len(stopped) < 300
    set_new_tokens(page, 6)
    send(page, "And again")
    expect(page, lambda p: reply(p) == LETTERS[:6])
    assert page.locator("#talk").inner_text().count("Go") == 1 and stopped in page.locator("#talk").inner_text()


def test_closing_the_page_frees_the_worker_within_a_second(browser, served):
    for _ in range(3):
        page, _ = watched(browser)
        opened(page, served[0])
        set_new_tokens(page, 450)
        send(page, "Go")
        expect(page, lambda p: len(reply(p)) > 5)
        page.context.close()
        time.sleep(1)
        assert still(served[1]), "the model goes on writing for nobody"


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
    expect_still(served[1])


@contextmanager
def both_workers_busy(address: str, waiting: int = 0) -> Iterator:
    """Somebody else's replies occupy the workers, and so many more requests wait; they end with the block."""
    from gradio_client import Client

    other = Client(address, verbose=False, analytics_enabled=False)
    jobs = []
    try:
        for n in (WORKERS, waiting):
            new = [other.submit("Hi", temperature=0, max_new_tokens=480, api_name="/chat") for _ in range(n)]
            jobs += new
            end = time.monotonic() + 30
            while not all(job.outputs() for job in jobs[:WORKERS]) or None in [j.status().rank for j in jobs[WORKERS:]]:
                assert time.monotonic() < end, "the queue did not fill"
                time.sleep(0.02)
        yield jobs
    finally:
        for job in jobs[::-1]:
            job.cancel()


@pytest.mark.parametrize("way_out", ["#stop", "#clear"])
def test_who_waits_sees_the_place_in_the_queue_and_can_leave_it(page, served, way_out):
    set_new_tokens(page, 3)
    send(page, "Before")
    expect(page, lambda p: reply(p) == LETTERS[:3] and p.locator("#retry").is_enabled())
    with both_workers_busy(served[0]):
        send(page, "Shall I wait?")
        place = page.locator("#status .progress-text")
        expect(page, lambda p: place.is_visible() and "queue: 1/1" in place.inner_text())
        seen, around = place.bounding_box(), place.locator("..").bounding_box()  # which cuts off what is beyond it
        assert seen["height"] >= 15 and around["y"] <= seen["y"]
        assert seen["y"] + seen["height"] <= around["y"] + around["height"] + 1
        assert page.locator("#stop").is_visible() and page.locator("#retry").is_disabled()
        page.locator(way_out).click()
        expect(page, lambda p: p.locator("#send").is_visible() and not p.locator("#stop").is_visible())
        left = ["Before", LETTERS[:3]] if way_out == "#stop" else []
        expect(page, lambda p: said(p) == left)
        kept = page.locator("#message textarea").input_value()
        assert kept == "Shall I wait?"
    expect_still(served[1])
    page.wait_for_timeout(300)
    assert said(page) == left, "a request that was taken back was answered"
    send(page, "After")
    expect(page, lambda p: said(p) == [*left, "After", LETTERS[:3]])


def test_a_full_queue_is_told_and_the_message_stays(browser, served):
    page, complaints = watched(browser)
    opened(page, served[0])
    with both_workers_busy(served[0], QUEUE):
        send(page, "Too late")
        expect(page, lambda p: "try again" in p.locator("body").inner_text())
        expect(page, lambda p: p.locator("#send").is_visible() and not p.locator("#stop").is_visible())
        assert page.locator("#message textarea").input_value() == "Too late" and said(page) == []
    assert {text.split(":")[0] for text in complaints} == {"503", "console"}  # the refusal itself
    page.context.close()
    expect_still(served[1])


def test_side_by_side_shows_both_models_at_once(page):
    set_new_tokens(page, 20)
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#prompt textarea").fill("Hello")
    page.locator("#ask").click()
    # whether a button is shown says nothing: it changes a moment before or after the texts
    texts = {"#base": "abcdefghij.", "#tuned": LETTERS[:20]}
    grown: dict[str, set[int]] = {name: set() for name in texts}

    def whole(p) -> bool:
        now = {name: p.locator(f"{name} .answer").inner_text() for name in texts}
        for name, text in now.items():
            assert texts[name].startswith(text.strip("…"))
            grown[name].add(len(text))
        return now == texts

    expect(page, whole)
    assert all(len(lengths) > 3 for lengths in grown.values()), "the answers came in one piece"
    for name, cost in (("#base", "12 tokens"), ("#tuned", "20 tokens")):
        expect(page, lambda p, name=name, cost=cost: cost in p.locator(name).inner_text())
    expect(page, lambda p: p.locator("#ask").is_visible() and not p.locator("#stop-both").is_visible())


def test_side_by_side_stops(page, served):
    set_new_tokens(page, 400)
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#prompt textarea").fill("Hello")
    page.locator("#ask").click()
    expect(page, lambda p: "ABCD" in p.locator("#tuned").inner_text())
    page.locator("#stop-both").click()
    page.locator("#ask").wait_for()
    expect_still(served[1])


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
    assert page.locator("#talk img, #talk script, #talk b").count() == 0
    assert page.locator("#talk article.user > p").evaluate("p => p.childNodes.length") == 1  # one text node, no element


def test_a_bad_message_says_why_and_stays(page):
    send(page, "   ")
    expect(page, lambda p: "empty" in p.locator("#status").inner_text())
    send(page, "x" * 3000)
    expect(page, lambda p: "3017 tokens" in p.locator("#status").inner_text())
    assert page.locator("#message textarea").input_value() == "x" * 3000 and said(page) == []


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
    open_settings(page)
    assert page.get_by_label("Seed").input_value() == ""
    cache = page.get_by_label("KV cache")
    assert cache.is_checked()
    cache.uncheck()
    set_new_tokens(page, 5)
    send(page, "Hello")
    expect(page, lambda p: "cache off" in p.locator("#status").inner_text())


@pytest.mark.parametrize(
    ("width", "system", "asked", "dark"),
    [(1280, "light", "", False), (1280, "dark", "", True), (390, "light", "dark", True), (320, "dark", "light", False)],
)
def test_the_page_fits_every_width_and_is_light_or_dark_as_asked(browser, served, width, system, asked, dark):
    page, complaints = watched(browser, width, 800, color_scheme=system)
    opened(page, served[0] + (f"?__theme={asked}" if asked else ""))
    send(page, "A long word: " + "x" * 200)
    expect(page, lambda p: len(reply(p)) > 20)
    for tab in ("Side by side", "Attention", "Chat"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{tab} scrolls sideways"
    for name in ("body", "#talk .log", "#talk article.assistant > p", "#message textarea", "#clear"):
        painted = page.locator(name).first.evaluate("e => getComputedStyle(e).backgroundColor")
        channels = [int(n) for n in re.findall(r"\d+", painted)[:3]]
        assert max(channels) < 70 if dark else min(channels) > 225, f"{name} is painted {painted}"
    for name in ("#message textarea", "#talk", "#clear"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 40
    page.locator("#clear").click()
    assert page.locator("#message textarea").bounding_box()["y"] < 800  # the box is in sight without scrolling
    page.context.close()
    assert complaints == []


# --- what a conversation can do


def test_edit_undo_and_copy(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    set_new_tokens(page, 4)
    for n, text in enumerate(("First <b>", "Second & third"), start=1):
        send(page, text)
        expect(page, lambda p, n=n: len(said(p)) == 2 * n and reply(p) == LETTERS[:4])
    page.locator("#talk article.user button", has_text="Copy").first.click()
    expect(page, lambda p: p.evaluate("navigator.clipboard.readText()") == "First <b>")
    page.locator("#undo").click()
    expect(page, lambda p: said(p) == ["First <b>", LETTERS[:4]])
    send(page, "Again")
    expect(page, lambda p: said(p)[2:] == ["Again", LETTERS[:4]])
    page.locator("#talk article.user button", has_text="Edit").first.click()
    expect(page, lambda p: p.locator("#message textarea").input_value() == "First <b>")
    assert len(said(page)) == 4 and page.locator("#talk .going").count() == 3
    page.locator("#message textarea").fill("Changed")
    page.locator("#message textarea").press("Enter")
    expect(page, lambda p: said(p) == ["Changed", LETTERS[:4]])


def test_what_the_model_no_longer_reads_is_marked(page):
    set_new_tokens(page, 4)
    for n in range(3):  # 173 of 512 positions each
        assert page.locator("#talk .forgot").count() == page.locator("#talk .gone").count() == 0
        send(page, f"{n}" + "x" * 149)
        expect(page, lambda p, n=n: len(said(p)) == 2 * n + 2 and reply(p) == LETTERS[:4])
        expect(page, lambda p: p.locator("#retry").is_enabled())
    line = page.locator("#talk .forgot")
    assert "no longer reads what is above" in line.inner_text() and line.is_visible()
    assert page.locator("#talk .gone").count() == 2
    above, below = "previousElementSibling", "nextElementSibling"
    assert "assistant gone" in line.evaluate(f"e => e.{above}.className").replace("  ", " ")
    assert line.evaluate(f"e => e.{below}.className").strip() == "user"
    assert "left out the oldest turn" in page.locator("#status").inner_text()
    send(page, "")  # refused
    page.locator("#status .notice").wait_for()
    assert line.is_visible() and page.locator("#talk .gone").count() == 2
    page.wait_for_function("Object.values(localStorage).length > 0")
    page.reload()
    expect(page, lambda p: len(said(p)) == 6 and line.is_visible() and p.locator("#talk .gone").count() == 2)
    page.locator("#clear").click()
    expect(page, lambda p: said(p) == [] and line.count() == 0)


def test_the_conversation_survives_a_reload_and_a_stop_and_ends_with_clear(page, served):
    set_new_tokens(page, 400)
    send(page, "Remember <me>")
    expect(page, lambda p: len(reply(p)) > 5)
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    expect_still(served[1])
    expect(page, lambda p: p.locator("#talk .busy").count() == 0)
    before = said(page)
    page.wait_for_timeout(300)
    page.reload()
    expect(page, lambda p: said(p) == before)
    assert not page.locator("#examples").is_visible()
    set_new_tokens(page, 5)
    send(page, "Go on")
    expect(page, lambda p: said(p) == [*before, "Go on", LETTERS[:5]])
    page.locator("#clear").click()
    expect(page, lambda p: said(p) == [])
    page.wait_for_timeout(300)
    page.reload()
    expect(page, lambda p: p.locator("#examples").is_visible() and said(p) == [])


@pytest.mark.parametrize("own", ['[{"role": 1}]', "no JSON", "[[[", "null", "7"])
def test_a_forged_history_in_the_browser_does_no_harm(browser, served, own):
    page, _ = watched(browser)  # Gradio writes to the console that it cannot read it
    opened(page, served[0])
    talked(page, "Hello")
    page.wait_for_timeout(500)  # until the last of it has been stored
    for where in ("localStorage", "sessionStorage"):
        forged = "'[{\"role\": 1}]'" if where == "localStorage" else f"'{own}'"
        page.evaluate(f"for (const key of Object.keys({where})) {where}.setItem(key, {forged})")
    page.reload()
    expect(page, lambda p: p.locator("#examples").is_visible() and said(p) == [])
    send(page, "Hello")
    expect(page, lambda p: reply(p) != "")
    page.context.close()


# --- looking inside


def test_the_alternatives_of_each_token_can_be_reached_by_mouse_and_by_keyboard(page):
    set_new_tokens(page, 6)
    page.get_by_label("Show alternatives").check()
    send(page, "Hello")
    expect(page, lambda p: p.locator("#choices input").count() == 6)
    assert page.locator("#choices label").all_inner_texts() == list(LETTERS[:6])
    visible = page.locator("#choices .one:visible")
    assert visible.count() == 1 and "A" in visible.locator(".taken").inner_text()
    page.locator("#choices label").nth(3).click()
    assert "D" in visible.locator(".taken").inner_text() and "100.0 %" in visible.locator(".taken").inner_text()
    page.keyboard.press("ArrowRight")
    assert "E" in visible.locator(".taken").inner_text() and visible.locator("tbody tr").count() == 8
    page.get_by_label("Show alternatives").uncheck()
    expect(page, lambda p: p.locator("#choices input").count() == 0)
    page.locator("#talk article.assistant button", has_text="Tokens").click()
    expect(page, lambda p: p.locator("#choices input").count() == 6)


def test_what_the_next_token_is_drawn_from_is_shown_live(page, served):
    set_new_tokens(page, 400)
    page.get_by_label("Show alternatives").check()
    send(page, "Hello")
    seen = set()

    def several(p) -> bool:
        taken = p.locator("#choices .taken th")
        seen.update(taken.all_inner_texts())
        return len(seen) > 3

    expect(page, several)
    page.locator("#stop").click()
    page.locator("#send").wait_for()
    assert seen <= set(LETTERS)


def test_attention_is_drawn_for_a_text_a_layer_and_a_head(page):
    page.get_by_role("tab", name="Attention").click()
    page.locator("#text textarea").fill("A <b> c")
    page.locator("#look").click()
    expect(page, lambda p: p.locator("#map tbody tr").count() == 7)
    assert page.locator("#map tbody th").all_inner_texts() == ["A", "·", "<", "b", ">", "·", "c"]
    assert page.locator("#map tbody tr").last.locator("td").count() == 7 and page.locator("#map b").count() == 0
    assert page.locator("#heads b").count() == 0 and page.locator("#heads input").count() == 2  # the head and the mean
    page.locator("#text textarea").fill("x" * 100)
    page.locator("#text textarea").press("Enter")
    expect(page, lambda p: "1 to 64 can be drawn" in p.locator("#map").inner_text())


def test_a_head_is_chosen_among_all_by_mouse_by_keyboard_and_by_number(browser, several_heads):
    address, models = several_heads
    page, complaints = watched(browser)
    opened(page, address)
    page.get_by_role("tab", name="Attention").click()
    text = "abc"
    page.locator("#text textarea").fill(text)
    page.locator("#text textarea").press("Enter")
    heads, chosen = page.locator("#heads label"), page.locator("#heads input:checked")
    expect(page, lambda p: p.locator("#map tbody tr").count() == len(text) and heads.count() == 3 * (2 + 1))
    sides = {page.locator("#heads label").nth(n).evaluate("e => e.getBoundingClientRect().width") for n in range(9)}
    assert len(sides) == 1 and min(sides) > 20
    maps = attention_maps(models.tuned, list(text.encode()))  # (3, 2, T, T)

    def drawn(layer: int, head: int) -> bool:
        weights = maps[layer - 1, head - 1] if head else maps[layer - 1].mean(0)
        wanted = [f"{100 * weights[t, s]:.1f} %" for t in range(3) for s in range(t + 1)]
        titles = page.locator("#map td[title]").evaluate_all("all => all.map(e => e.title.split(': ').pop())")
        numbers = [page.get_by_label(f"number input for {n}").input_value() for n in ("Layer", "Head")]
        return titles == wanted and numbers == [f"{layer}", f"{head}"]

    expect(page, lambda p: drawn(2, 2))
    page.locator("label[for=head-3-1]").click()
    expect(page, lambda p: drawn(3, 1))
    page.keyboard.press("ArrowRight")
    expect(page, lambda p: drawn(3, 2) and chosen.get_attribute("id") == "head-3-2")
    page.get_by_label("number input for Layer").fill("2")
    page.get_by_label("number input for Layer").press("Tab")
    expect(page, lambda p: drawn(2, 2) and chosen.get_attribute("id") == "head-2-2")
    page.context.close()
    assert complaints == []


def test_the_adapter_is_switched_off_and_on(page):
    set_new_tokens(page, 5)
    page.get_by_label("base model", exact=True).check()
    send(page, "Hello")
    expect(page, lambda p: reply(p) == "abcde")
    page.get_by_label("tuned for chat", exact=True).check()
    page.locator("#retry").click()
    expect(page, lambda p: reply(p) == "ABCDE")
    expect(page, lambda p: p.locator("#retry").is_enabled())
    set_number(page, "Adapter strength", 0)  # the base once more
    page.locator("#retry").click()
    expect(page, lambda p: reply(p) == "abcde")


# --- nothing is lost


def focused(page) -> bool:
    """Is the message box where one types?"""
    return page.evaluate("document.activeElement === document.querySelector('#message textarea')")


def talked(page, *questions: str, tokens: int = 4) -> list[str]:
    """Ask, wait for the replies, and return all that has been said."""
    set_new_tokens(page, tokens)
    for question in questions:
        count = len(said(page))
        send(page, question)
        expect(page, lambda p, count=count: len(said(p)) == count + 2 and reply(p) == LETTERS[:tokens])
        expect(page, lambda p: p.locator("#retry").is_enabled())
    return said(page)


def test_an_edit_can_be_cancelled_and_survives_nothing_but_sending(page):
    before = talked(page, "First", "Second", "Third")
    box, edit = page.locator("#message textarea"), page.locator("#talk article.user .Edit").first
    box.fill("half a draft")
    edit.click()
    expect(page, lambda p: box.input_value() == "First" and edit.inner_text() == "Cancel")
    expect(page, focused)
    assert said(page) == before and page.locator("#talk .going").count() == 5
    edit.click()
    expect(page, lambda p: box.input_value() == "half a draft" and p.locator("#talk .going").count() == 0)
    edit.click()
    expect(page, lambda p: p.locator("#talk .going").count() == 5)
    page.reload()  # in the middle of it
    expect(page, lambda p: said(p) == before)


@pytest.mark.parametrize("button", ["#clear", "#undo"])
def test_what_was_cleared_or_undone_is_brought_back(page, button):
    before = talked(page, "First", "Second")
    assert not page.locator("#back").is_visible()
    page.locator(button).click()
    expect(page, lambda p: len(said(p)) == (0 if button == "#clear" else 2))
    assert page.locator("#message textarea").input_value() == ("" if button == "#clear" else "Second")
    page.locator("#back").click()
    expect(page, lambda p: said(p) == before and not p.locator("#back").is_visible())
    page.wait_for_timeout(300)
    page.reload()
    expect(page, lambda p: said(p) == before)


def test_what_is_typed_right_after_clear_stays(page):
    talked(page, "First")
    page.locator("#clear").click()
    page.locator("#message textarea").press_sequentially("typed at once", delay=10)
    page.wait_for_timeout(800)
    assert page.locator("#message textarea").input_value() == "typed at once"


def test_a_reload_in_the_middle_of_a_reply_brings_back_what_was_written(browser, served):
    page, _ = watched(browser)  # Gradio writes to the console that its stream was cut
    opened(page, served[0])
    set_new_tokens(page, 450)
    send(page, "Go")
    expect(page, lambda p: len(reply(p)) > 60)
    page.reload()
    expect(page, lambda p: said(p)[:1] == ["Go"] and len(reply(p)) > 5)
    assert page.locator("#talk .busy").count() == 0
    page.context.close()
    expect_still(served[1])


def test_two_tabs_keep_their_own_conversations(page, served):
    first = talked(page, "First")
    other = page.context.new_page()
    opened(other, served[0])
    expect(other, lambda p: said(p) == first)  # a new tab begins with what was said last
    second = talked(other, "Second")
    third = talked(page, "Third")
    assert second == [*first, "Second", LETTERS[:4]] and third == [*first, "Third", LETTERS[:4]]
    for tab, wanted in ((page, third), (other, second)):
        tab.wait_for_timeout(300)
        tab.reload()
        expect(tab, lambda p, wanted=wanted: said(p) == wanted)
    page.locator("#clear").click()
    expect(page, lambda p: said(p) == [])
    page.wait_for_timeout(300)
    page.reload()
    expect(page, lambda p: p.locator("#examples").is_visible() and said(p) == [])
    other.reload()
    expect(other, lambda p: said(p) == second)


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768), (390, 844), (844, 390)])
def test_the_tokens_of_a_reply_come_into_sight_and_mark_it(browser, served, width, height):
    page, complaints = watched(browser, width, height)
    opened(page, served[0])
    talked(page, "First", "Second")
    page.locator("#talk article.assistant .Tokens").first.click()
    page.locator("#choices .strip").wait_for()
    page.wait_for_timeout(1000)  # it scrolls smoothly
    strip = page.locator("#choices .strip label").first.bounding_box()
    assert strip["y"] >= 0 and strip["y"] + strip["height"] <= height, strip
    marks = page.locator("#talk article.assistant").evaluate_all("all => all.map(e => e.classList.contains('looked'))")
    assert marks == [True, False]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if width >= 1200:  # beside the conversation, and the settings below it
        talk, settings = page.locator("#talk").bounding_box(), page.locator("#settings").bounding_box()
        assert strip["x"] > talk["x"] + talk["width"] and settings["y"] < height
    page.context.close()
    assert complaints == []


def test_the_tokens_follow_the_settings_and_say_whose_they_are(page):
    talked(page, "First")
    page.locator("#talk article.assistant .Tokens").click()
    page.locator("#choices .strip").wait_for()
    assert page.locator("#choices .whose").count() == 0
    page.get_by_label("base model", exact=True).check()
    expect(page, lambda p: "those of the base model" in p.locator("#choices").inner_text())


def test_the_focus_stays_in_the_message_box(page):
    for press in (lambda: page.get_by_role("button", name="Who are you?").click(),
                  lambda: send(page, "Hello"), lambda: page.locator("#retry").click()):
        set_new_tokens(page, 4)
        press()
        expect(page, lambda p: reply(p) == LETTERS[:4] and p.locator("#retry").is_enabled())
        expect(page, focused)
    outline = "getComputedStyle(document.querySelector('#message textarea')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.locator("#message textarea").blur()
    assert page.evaluate(outline) != "solid"


def test_sending_goes_to_the_end_of_the_conversation(page):
    talked(page, *[f"{n} " + "long " * 12 for n in range(5)])
    log = page.locator("#talk .log")
    log.evaluate("e => { e.scrollTop = 0; }")
    talked(page, "Last")
    assert log.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 60


def test_an_empty_page_says_what_it_is_and_what_to_ask(page):
    text = page.locator("#talk .hello").inner_text()
    assert "language model" in text and "Ask" in text and page.locator("#talk .hello").is_visible()
    talked(page, "First")
    assert not page.locator("#talk .hello").is_visible()


def test_forced_colours_keep_bars_and_maps(browser, several_heads):
    page, complaints = watched(browser, forced_colors="active")
    opened(page, several_heads[0])
    page.get_by_role("tab", name="Attention").click()
    page.locator("#map table").wait_for()
    painted = page.locator("#map tbody td").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(painted)) > 3
    assert page.locator("#heads i").first.evaluate("e => getComputedStyle(e).forcedColorAdjust") == "none"
    page.context.close()
    assert complaints == []


# --- everybody


def test_a_conversation_needs_no_mouse(page):
    """Tab and Shift+Tab reach everything, Enter and Space press it, and it can always be seen where one is."""
    set_new_tokens(page, 4)

    def go_to(what: str, key: str = "Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            if page.evaluate("s => document.activeElement.closest(s) !== null", what):
                style = page.evaluate("(() => {const s = getComputedStyle(document.activeElement); "
                                      "return s.outlineStyle + s.boxShadow})()")
                assert style != "nonenone", f"{what} does not show that it has the focus"
                return
        raise AssertionError(f"{what} cannot be reached with {key}")

    page.locator("#message textarea").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page, lambda p: reply(p) == LETTERS[:4] and p.locator("#send").is_visible())
    page.locator("#message textarea").focus()
    go_to("#talk article.assistant .Tokens", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page, lambda p: p.locator("#choices input").count() == 4)
    page.locator("#message textarea").focus()
    go_to("#clear")
    page.keyboard.press("Space")
    expect(page, lambda p: said(p) == [])
    page.locator("#message textarea").focus()
    go_to("#examples button", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page, lambda p: reply(p) == LETTERS[:4])
    go_to("#talk article.user .Edit", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page, lambda p: p.locator("#talk .editing").count() == 1)
    expect(page, focused)
    page.keyboard.type("And ")
    expect(page, lambda p: "And " in p.locator("#message textarea").input_value())


def test_axe_finds_no_serious_fault(browser, served):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page, complaints = watched(browser)
    opened(page, served[0])
    set_new_tokens(page, 4)
    page.get_by_label("Show alternatives").check()
    send(page, "Hello")
    expect(page, lambda p: p.locator("#choices input").count() == 4)
    faults = {}

    def check(where: str) -> None:
        expect(page, lambda p: p.locator(".pending").count() == 0)  # what is waited for is faint
        for scheme in ("light", "dark"):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
            page.wait_for_timeout(300)  # colours change gradually
            for v in axe.Axe().run(page).response["violations"]:
                if v["impact"] in ("serious", "critical"):
                    faults[f"{where}, {scheme}: {v['id']}"] = [node["html"][:200] for node in v["nodes"]]

    check("chat")
    page.get_by_role("tab", name="Side by side").click()
    page.locator("#ask").click()
    expect(page, lambda p: "tokens" in p.locator("#tuned").inner_text())
    check("side by side")
    page.get_by_role("tab", name="Attention").click()
    page.locator("#look").click()
    page.locator("#map table").wait_for()
    check("attention")
    page.set_viewport_size({"width": 390, "height": 800})
    page.get_by_role("tab", name="Chat").click()
    send(page, "")
    page.locator("#status .notice").wait_for()
    check("a phone, with a notice")
    page.context.close()
    assert faults == {} and complaints == []


def test_two_readers_at_once_do_not_meet(browser, served):
    pages = [watched(browser)[0] for _ in range(2)]
    for page in pages:
        opened(page, served[0])
        set_new_tokens(page, 250)
    for n, page in enumerate(pages):
        send(page, f"I am reader {n}")
    for page in pages:
        expect(page, lambda p: len(reply(p)) > 5)
    pages[0].locator("#stop").click()
    pages[0].locator("#send").wait_for()
    expect(pages[1], lambda p: reply(p) == (LETTERS * 10)[:250])
    for n, page in enumerate(pages):
        talk = page.locator("#talk").inner_text()
        assert f"reader {n}" in talk and f"reader {1 - n}" not in talk
        page.context.close()
