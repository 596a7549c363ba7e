# SPDX-License-Identifier: Apache-2.0
"""The pictures of the page of `hf-simprune explore`, taken in a headless browser.

    pip install -e ".[browser,demo]"
    python docs/make_screenshots.py --chromium "$(python tests/explore/fetch_chromium.py .venv/chromium)"

The portrait comes with matplotlib: grace_hopper.jpg by the US Navy, public domain. Latencies that the page shows are
this machine's: take the pictures on an idle one.
"""

import argparse
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from make_pictures import IMAGES, shrink
from matplotlib import get_data_path
from playwright.sync_api import Page, sync_playwright


PORTRAIT = Path(get_data_path(), "sample_data", "grace_hopper.jpg")
PROGRESS = 35  # percent of the curriculum
REMOVED = (5, 10)


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of the page, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "hf_simprune.cli",
        "explore",
        model,
        "--port",
        str(port),
        "--open_browser",
        "false",
    ]
    with tempfile.NamedTemporaryFile("r") as told:
        process = subprocess.Popen(command, stderr=open(told.name, "w"))
        try:
            while not (found := re.search(r" is open at (\S+)\n?", text := Path(told.name).read_text())):
                if process.poll() is not None:
                    sys.exit(text)
                time.sleep(0.1)
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def opened(page: Page, address: str) -> None:
    """The page with the portrait, and its first answer."""
    page.goto(address)
    page.wait_for_selector("#token_panels .hs-notice")
    page.set_input_files("#image input[type=file]", PORTRAIT)
    page.wait_for_selector("#token_panels img")


def tokens(page: Page) -> None:
    """What is left of both views at a place of the curriculum."""
    first = page.locator("#token_panels img").nth(1).get_attribute("src")
    page.locator("#progress input[type=number]").fill(str(PROGRESS))
    page.locator("#progress input[type=number]").press("Enter")
    page.wait_for_function("old => document.querySelectorAll('#token_panels img')[1].src !== old", arg=first)


def blocks(page: Page) -> None:
    """Two blocks picked, and what that changes."""
    page.get_by_role("tab", name="Blocks").click()
    page.wait_for_selector("#effect table")
    for block in REMOVED:
        page.get_by_role("checkbox", name=str(block), exact=True).check()
    page.wait_for_function(f"document.querySelectorAll('#heat td.hs-removed').length === {len(REMOVED)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/deit-tiny-patch16-224", help="Hub name or folder")
    parser.add_argument("--chromium", required=True, help="the browser's executable")
    parser.add_argument("--output", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    looks = {"explore_tokens": (tokens, "light"), "explore_blocks": (blocks, "dark")}
    with served(arguments.model) as address, sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        for name, (show, scheme) in looks.items():
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(120_000)
            opened(page, address)
            show(page)
            page.wait_for_timeout(1000)  # transitions
            taken = Path(folder) / f"{name}.png"
            page.screenshot(path=taken, full_page=True)
            shrink(taken)
            (arguments.output / taken.name).write_bytes(taken.read_bytes())
            page.close()
            print(arguments.output / taken.name)
        browser.close()


if __name__ == "__main__":
    main()
