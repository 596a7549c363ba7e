"""The page in a headless browser, from end to end: the Space's own folder serves it, as a Space would.

`make test-browser` fetches a browser; `HF_SIMPRUNE_CHROMIUM` names one that is there. `HF_SIMPRUNE_SCREENSHOTS` names
a folder for pictures of every stage.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..tiny_run import png
from .conftest import picture


pytest.importorskip("gradio", reason="the page needs gradio: pip install 'hf-simprune[explore]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("HF_SIMPRUNE_CHROMIUM")
if not CHROMIUM or not Path(CHROMIUM).exists():
    pytest.skip("no browser: HF_SIMPRUNE_CHROMIUM names none", allow_module_level=True)

PATIENCE = 60_000  # ms; the machine may be busy
LOADED_WITHIN = 3.0  # seconds


@pytest.fixture(scope="module")
def address(tmp_path_factory, model_folder, data_set) -> Iterator[str]:
    """Where a Space is served by a process that has its folder and nothing else of this project."""
    from hf_simprune.explore.images import ImageSource
    from hf_simprune.explore.space import write_space

    folder = write_space(tmp_path_factory.mktemp("page") / "space", str(model_folder), ImageSource(data_set))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=file, stderr=file)
        try:
            until = time.monotonic() + PATIENCE / 1000
            while " is open at " not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield re.search(r" is open at (\S+)", log.read_text())[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0, "Ctrl-C is the way to end it, not an error"


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser, address) -> Iterator["playwright.Page"]:
    """The page opened, watched for errors and for requests to other machines."""
    found = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    found.set_default_timeout(PATIENCE)
    complaints, elsewhere = [], []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on(
        "request", lambda request: request.url.startswith(("data:", "blob:", address)) or elsewhere.append(request.url)
    )
    found.goto(address)
    found.wait_for_selector("#token_panels .hs-notice")
    yield found
    found.close()
    assert complaints == [] and elsewhere == []


@pytest.fixture
def photograph(page):
    folder = os.environ.get("HF_SIMPRUNE_SCREENSHOTS")

    def take(name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.wait_for_timeout(400)  # transitions
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return take


@pytest.fixture(scope="module")
def upload(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "picture.png"
    picture(7, 64, 48).save(path)
    return path


def panels(page) -> list[str]:
    return page.eval_on_selector_all("#token_panels img", "images => images.map(image => image.src)")


def changed(page, before: list[str]) -> list[str]:
    """The panels once the first reduced one differs from `before`."""
    script = "old => { const i = document.querySelectorAll('#token_panels img')[1]; return i && i.src !== old; }"
    page.wait_for_function(script, arg=before[1] if before else "")
    return panels(page)


def test_upload_slider_and_picked_blocks_change_what_is_shown(page, upload, photograph):
    photograph("1_light")
    page.set_input_files("#image input[type=file]", upload)
    first = changed(page, [])
    assert page.locator("#token_panels img").count() == 8
    assert page.get_by_text("12 of 16 kept").count() == 2
    photograph("2_uploaded")

    slider = page.locator("#progress input[type=range]")
    slider.focus()
    slider.press("End")  # by keyboard, as everything here can be
    last = changed(page, first)
    assert (last[0], last[4]) == (first[0], first[4]), "the views stay, what is dropped of them changes"
    photograph("3_slider")
    page.locator("#views").press("Enter")
    assert changed(page, last)[0] != first[0]

    page.get_by_role("tab", name="Tokens").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#effect table")
    assert page.locator("#effect caption").inner_text() == "nothing replaced in 6 blocks"
    photograph("4_blocks")
    for block in ("2", "3"):
        box = page.get_by_role("checkbox", name=block, exact=True)
        box.focus()
        page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('#effect caption').textContent.includes('identity 2→4')")
    rows = dict(zip(*(page.locator(f"#effect tbody {cell}").all_inner_texts() for cell in ("th", "td:nth-child(3)"))))
    assert rows["blocks"] == "4" and float(rows["latency of this image, ms"]) > 0
    assert page.locator("#heat td.hs-removed").get_attribute("title").startswith("blocks 2 to 3:")
    shares = page.locator("#classes tbody tr").all_inner_texts()
    assert len(shares) == 4 and any(line.split()[-2:] != line.split()[-4:-2] for line in shares)
    assert page.locator("#attention img").count() == 3
    photograph("5_picked")

    page.locator("#measure").press("Enter")
    page.wait_for_function("document.querySelector('#effect caption').textContent.includes('fold 2→4')")
    assert page.locator("#heat table").count() == 2
    photograph("6_folded")


BACKGROUND = (
    "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3)"
    ".reduce((sum, part) => sum + Number(part), 0)"
)


def test_dark_mode_follows_the_system_and_can_be_switched(page, browser, address, photograph):
    assert page.evaluate(BACKGROUND) > 600
    page.locator("#dark").press("Enter")
    page.wait_for_function(f"{BACKGROUND} < 150")
    photograph("7_dark")
    page.locator("#dark").press("Enter")
    page.wait_for_function(f"{BACKGROUND} > 600")
    dark = browser.new_page(color_scheme="dark")
    dark.goto(address)
    dark.wait_for_selector("#token_panels .hs-notice", timeout=PATIENCE)
    assert dark.evaluate(BACKGROUND) < 150
    dark.close()


def test_an_example_is_taken_and_an_image_that_cannot_be_read_is_named(page, tmp_path):
    page.locator("#examples button.thumbnail-item").nth(1).press("Enter")
    shown = changed(page, [])
    assert len(shown) == 8
    broken = tmp_path / "broken.png"
    broken.write_bytes(png(0)[:100])
    page.get_by_label("Remove Image").press("Enter")
    page.wait_for_selector("#token_panels .hs-notice")
    page.set_input_files("#image input[type=file]", broken)
    page.wait_for_selector(".toast-body")


def test_the_page_is_there_soon_after_the_model(browser, address):
    seconds = []
    for _ in range(3):
        page = browser.new_context().new_page()
        started = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("#token_panels .hs-notice", timeout=PATIENCE)
        seconds.append(time.perf_counter() - started)
        page.context.close()
    print("page loads, s:", " ".join(f"{value:.2f}" for value in seconds))
    assert min(seconds) < LOADED_WITHIN
