"""Make notebooks/images/chat.png anew, the chat page after three questions: `python tests/picture_of_chat.py`."""

import sys
from pathlib import Path

from browser import chromium, watched

from minigpt_lib.chat.app import build_app, launch

PICTURE = Path(__file__).resolve().parents[1] / "notebooks" / "images" / "chat.png"
UNSURE = 7  # the token of the last reply whose alternatives are shown
QUESTIONS = ("Who are you?", "What is the capital of Norway?", "What does a cow eat?")


def main(path: Path) -> None:
    app = build_app("mini", device="cpu")
    address = launch(app, 0, block=False)
    with chromium() as browser:
        page, complaints = watched(browser, 1360, 800)
        page.goto(address)
        page.get_by_label("Show alternatives").check()
        for n, question in enumerate(QUESTIONS, start=1):
            page.locator("#message textarea").fill(question)
            page.locator("#send").click()
            page.wait_for_function(f"document.querySelectorAll('#talk article.assistant').length == {n}")
            page.wait_for_function("document.querySelector('#retry') && !document.querySelector('#retry').disabled")
            page.locator("#choices .strip").wait_for()
        page.locator("#choices label").nth(UNSURE).click()
        page.wait_for_timeout(500)
        path.parent.mkdir(exist_ok=True)
        page.mouse.move(0, 0)
        page.screenshot(path=path)
        print(page.locator("#talk").inner_text(), complaints)
    app.close(verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
