"""Notebooks as a learner meets them: JupyterLab in a browser, "Run All Cells", then a widget moved by hand."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from browser import chromium, watched

ROOT = Path(__file__).resolve().parents[1]
START_S = 60  # JupyterLab's start on a slow machine
RUN_MS = 240_000  # all cells of one notebook
WAITING = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(e => e.innerText.includes('*'))"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address, with {} for a notebook's name, of a JupyterLab that knows nothing of this user's settings."""
    pytest.importorskip("jupyterlab", reason="the course is read in JupyterLab")
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "course" / "notebooks", ignore=shutil.ignore_patterns(".ipynb_*"))
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)  # all cells in the page at once, not only those in view
    overrides.write_text(json.dumps({"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    settings = {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data")}
    fixed = {"MINIGPT_MODEL": "mini", "MINIGPT_DEVICE": "cpu", "IPYTHONDIR": str(home / "ipython")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--LabApp.news_url="]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={home / 'course'}"]
    with subprocess.Popen(command, env=os.environ | settings | fixed, stderr=subprocess.PIPE, text=True) as server:
        guard = threading.Timer(START_S, server.kill)
        guard.start()
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+/lab)\?token=(\w+)", line):
                break
        guard.cancel()
        assert found, "JupyterLab did not start:\n" + "".join(lines[-20:])
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would block the server
        yield f"{found[1]}/tree/notebooks/{{}}?token={found[2]}&reset"
        server.terminate()


@pytest.fixture(scope="module")
def browser():
    with chromium() as b:
        yield b


def run_all(browser, address: str):
    """A page with the notebook open and all of its cells run, and its first row of widgets."""
    playwright = pytest.importorskip("playwright.sync_api")
    page, complaints = watched(browser, 1400, 1000)
    dialog = page.locator("dialog.jp-Dialog")  # on a slow machine it may ask for a kernel that is still starting
    page.add_locator_handler(dialog, lambda found: found.locator("button.jp-mod-accept").click())
    page.goto(address)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")  # the kernel is up
    for _ in range(6):  # a click that comes before the notebook is ready does nothing, for a learner too
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        with suppress(playwright.TimeoutError):
            page.wait_for_function(WAITING, timeout=10_000)
            break
    page.wait_for_function(f"!{WAITING}", timeout=RUN_MS)
    widget = page.locator(".widget-interact")
    widget.scroll_into_view_if_needed()
    return page, widget, complaints


def test_a_picture_follows_its_checkbox_and_slider(lab, browser):
    page, widget, complaints = run_all(browser, lab.format("02_attention.ipynb"))
    picture = widget.locator("img")
    before = picture.get_attribute("src")
    widget.locator("input[type=checkbox]").click()
    page.wait_for_function("([e, old]) => e.querySelector('img')?.src != old", arg=[widget.element_handle(), before])
    between = picture.get_attribute("src")
    widget.locator(".noUi-handle").last.press("End")
    page.wait_for_function("([e, old]) => e.querySelector('img')?.src != old", arg=[widget.element_handle(), between])
    assert len({before, between, picture.get_attribute("src")}) == 3
    check(page, complaints)


def test_an_answer_follows_the_text_typed(lab, browser):
    page, widget, complaints = run_all(browser, lab.format("01_tokenization.ipynb"))
    widget.locator("input[type=text]").fill("Zebras zigzag")
    widget.locator("input[type=text]").press("Enter")  # an input of 13 bytes
    page.wait_for_function("e => e.innerText.includes('13 bytes, ')", arg=widget.element_handle())
    check(page, complaints)


def check(page, complaints: list[str]) -> None:
    """No cell failed, and nothing was asked from another machine."""
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-mod-error, .jp-OutputArea-output:has-text('Traceback')").count() == 0
    assert not [c for c in complaints if not c.startswith("a websocket to ws://127.0.0.1")]
