"""No snippet of docs/works_with.md that no test runs."""

import re
from pathlib import Path

from .conftest import PAGE, snippet


def test_every_snippet_of_the_page_is_run():
    headings = [found for found in re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M) if snippet(found)]
    run = set(
        re.findall(r'\.run\("([^"]+)"\)', "".join(file.read_text() for file in Path(__file__).parent.glob("*.py")))
    )
    assert set(headings) == run and len(headings) == 10
