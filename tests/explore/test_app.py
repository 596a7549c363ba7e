"""The page is put together and served: what needs gradio but no browser."""

import socket

import pytest

from hf_simprune.errors import InputError
from hf_simprune.explore.app import build_app, launch, page_options

from .conftest import picture


pytest.importorskip("gradio", reason="the page needs gradio: pip install 'hf-simprune[explore]'")


def test_controls_that_need_images_are_there_only_with_images(checkpoint):
    always = {"image", "progress", "keep_rate", "views", "token_panels", "picked", "kind", "effect", "heat", "dark"}
    bare = _names(build_app(checkpoint))
    full = _names(build_app(checkpoint, [picture(seed) for seed in range(9)]))
    assert always <= bare and full - bare == {"examples", "measure"}


def test_the_page_stays_on_this_machine(checkpoint):
    assert page_options()["share"] is False
    page = build_app(checkpoint)
    assert page.analytics_enabled is False
    assert "googleapis" not in str(page_options()["theme"]._get_theme_css())


def test_a_port_that_is_taken_is_named_in_one_line(model_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: it is taken") as error:
            launch(str(model_folder), port=port, open_browser=False)
    assert "\n" not in str(error.value)


def _names(page) -> set[str]:
    return {block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)}
