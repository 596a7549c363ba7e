# SPDX-License-Identifier: Apache-2.0
"""The page of `hf-simprune explore`: controls on the left, answers on the right. All answers come from `Explorer`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError


if TYPE_CHECKING:
    import gradio as gr
    from datasets import Dataset

    from ..rba.checkpoint import Checkpoint
    from .explorer import Explorer
    from .images import ImageSource

DEFAULT_PORT = 7860
WITHOUT_GRADIO = "explore needs gradio, which is not installed: pip install 'hf-simprune[explore]'"
_STYLE = Path(__file__).with_name("page.css")
# gradio writes the colour of the whole page once, when it opens
_TOGGLE_DARK = (
    "() => { document.body.classList.toggle('dark'); document.body.style.background = 'var(--body-background-fill)'; }"
)
_NO_IMAGE = "Upload an image, or choose one, on the left."
_ABOUT_TOKENS = (
    "Student and teacher see two augmented views of one image. At each reduction layer patches leave both views in "
    "pairs, chosen by how alike they are across the views: at the start of the curriculum the least alike leave, at "
    "its end the most alike. Shown with this model as student and teacher."
)
_ABOUT_BLOCKS = "Pick blocks to remove; what the model becomes is measured on the image to the left."
_MAPS = [("nothing", "identity"), ("a fold into the block before", "fold")]


def launch(
    model: str,
    images: ImageSource | None = None,
    *,
    model_revision: str | None = None,
    token: str | None = None,
    port: int | None = DEFAULT_PORT,
    open_browser: bool = True,
) -> None:
    """Open the page for a model and serve it until Ctrl-C.

    Args:
        model: a folder that `save_pretrained` wrote, or a model on the Hub.
        images: gives examples, and images to measure on.
        model_revision: branch, tag or commit of a model on the Hub.
        token: of the Hub; by default the one stored by `hf auth login`.
        port: on this machine alone, unless the environment's GRADIO_SERVER_NAME says otherwise; None takes that of
            GRADIO_SERVER_PORT or the first free one from 7860 on.
        open_browser: show the page there too.

    Raises:
        InputError: gradio is not installed, there is no such model or data set, or the port is taken.
    """
    require_gradio()
    # gradio takes seconds to import; the model is read meanwhile
    importing = threading.Thread(target=__import__, args=("gradio",), daemon=True)
    importing.start()
    from ..rba.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(model, model_revision, token)
    opened = None if images is None else images.open()
    importing.join()
    page = build_app(checkpoint, opened)
    try:
        _, url, _ = page.launch(
            server_port=port, inbrowser=open_browser, quiet=True, prevent_thread_lock=True, **page_options()
        )
    except OSError as error:
        raise InputError(f"--port {port}: it is taken; name another one ({error})") from error
    print(f"{Path(model).name} is open at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        page.close(verbose=False)


def require_gradio() -> None:
    """Raises InputError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise InputError(WITHOUT_GRADIO)


def page_options() -> dict[str, Any]:
    """What `launch` of gradio is told beside the address: looks, and nothing that reaches beyond this machine."""
    import gradio as gr

    theme = gr.themes.Soft(primary_hue="blue", font=["ui-sans-serif", "system-ui", "sans-serif"])
    return {
        "theme": theme,
        "css": _STYLE.read_text(encoding="utf-8"),
        "show_error": True,
        "share": False,
        "ssr_mode": False,
        "footer_links": ["gradio"],
        "max_file_size": "32mb",
    }


def build_app(
    model: Checkpoint, images: Dataset | Sequence[Any] | None = None, *, timed_seconds: float = 1.5
) -> gr.Blocks:
    """The page, not yet served: hand `page_options()` to its `launch`.

    Args:
        model: the loaded model with its image processor.
        images: examples, and what the measuring of folds reads; PIL images, or a data set with a column of images.
        timed_seconds: about how long each latency is measured.

    Raises:
        InputError: gradio is not installed, or the model's family is not supported.
    """
    require_gradio()
    import gradio as gr

    from .explorer import EXAMPLES, Explorer
    from .markup import notice
    from .removal import removable_blocks

    explorer = Explorer(model, images, timed_seconds)
    with gr.Blocks(title=f"{explorer.name} · hf_simprune", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_classes="hs-head"):
            gr.Markdown(f"# {explorer.name}\n{explorer.facts()}")
            dark = gr.Button("Light / dark", size="sm", scale=0, min_width=120, elem_id="dark")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = gr.Image(
                    type="pil", label="Image", sources=["upload", "clipboard"], height=280, elem_id="image"
                )
                examples = explorer.examples(EXAMPLES)
                gallery = None
                if examples:
                    gallery = gr.Gallery(
                        examples, label="Examples", show_label=False, columns=3, height="auto", allow_preview=False,
                        elem_id="examples", interactive=False, buttons=[],
                    )  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Tokens", id="tokens") as tokens_tab:
                    tokens = _tokens_tab(gr, explorer, image)
                with gr.Tab("Blocks", id="blocks") as blocks_tab:
                    blocks = _blocks_tab(gr, explorer, image, removable_blocks(explorer.adapter))
        dark.click(None, js=_TOGGLE_DARK)
        if gallery is not None:
            gallery.select(_chooser(gr, examples), None, image, show_progress="hidden", api_visibility="private")
        image.change(tokens.answer, tokens.inputs, tokens.outputs, api_visibility="private")
        # seconds of work, and a latency that other work would spoil: only for whoever looks at it
        looked = gr.State(False)
        image.change(
            lambda looked, *words: blocks.answer(*words) if looked else (notice(_NO_IMAGE), "", "", ""),
            [looked, *blocks.inputs],
            blocks.outputs,
            api_visibility="private",
        )
        blocks_tab.select(lambda: True, None, looked, api_visibility="private").then(
            blocks.answer, blocks.inputs, blocks.outputs, api_visibility="private", show_progress_on=blocks.outputs[0]
        )
        tokens_tab.select(lambda: False, None, looked, api_visibility="private")
    return page


class _Part:
    """One tab: what it answers, from what, into what."""

    def __init__(self, answer: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        self.answer, self.inputs, self.outputs = answer, inputs, outputs


def _tokens_tab(gr: Any, explorer: Explorer, image: Any) -> _Part:
    from .markup import notice, token_panels

    gr.Markdown(_ABOUT_TOKENS)
    seed = gr.State(0)
    with gr.Row():
        progress = gr.Slider(0, 100, 0, step=1, label="Place in the curriculum, %", elem_id="progress", buttons=[])
        keep_rate = gr.Slider(0.3, 1, 0.7, step=0.05, label="Keep rate at each layer", elem_id="keep_rate", buttons=[])
        again = gr.Button("New views", size="sm", scale=0, min_width=110, elem_id="views")
    panels = gr.HTML(notice(_NO_IMAGE), elem_id="token_panels")

    def answer(image: Any, seed: int, progress: float, keep_rate: float) -> str:
        if image is None:
            return notice(_NO_IMAGE)
        return token_panels(_asked(gr, explorer.tokens, image, seed, progress / 100, keep_rate))

    part = _Part(answer, [image, seed, progress, keep_rate], [panels])
    quiet = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    for slider in (progress, keep_rate):
        slider.input(answer, part.inputs, part.outputs, **quiet)
    again.click(lambda seed: seed + 1, seed, seed, show_progress="hidden", api_visibility="private").then(
        answer, part.inputs, part.outputs, **quiet
    )
    return part


def _blocks_tab(gr: Any, explorer: Explorer, image: Any, blocks: Sequence[int]) -> _Part:
    from .explorer import MEASURED_IMAGES
    from .markup import attention_panels, class_bars, effect_table, notice, redundancy_tables

    gr.Markdown(_ABOUT_BLOCKS)
    picked = gr.CheckboxGroup(
        [(str(block), block) for block in blocks], label="Blocks to remove", elem_id="picked", elem_classes="hs-blocks"
    )
    kind = gr.Radio(_MAPS, value="identity", label="Replace them by", visible=False, elem_id="kind")
    measure = None
    if explorer.number_of_images:
        count = min(MEASURED_IMAGES, explorer.number_of_images)
        with gr.Row():
            measure = gr.Button(
                f"Measure on {count} images, to fold removed blocks",
                size="sm",
                scale=0,
                min_width=360,
                elem_id="measure",
            )
    with gr.Row():
        with gr.Column(min_width=280):
            effect = gr.HTML(notice(_NO_IMAGE), elem_id="effect")
        with gr.Column(min_width=280):
            classes = gr.HTML(elem_id="classes")
    attention = gr.HTML(elem_id="attention")
    heat = gr.HTML(elem_id="heat")

    def answer(image: Any, picked: list[int], kind: str) -> tuple[str, str, str, str]:
        shown = redundancy_tables(explorer.redundancy(image), picked)
        if image is None:
            return notice(_NO_IMAGE), "", "", shown
        changed = _asked(gr, explorer.remove, image, picked, kind)
        return effect_table(changed), class_bars(changed), attention_panels(explorer.seen(image), changed), shown

    part = _Part(answer, [image, picked, kind], [effect, classes, attention, heat])
    options = {"trigger_mode": "always_last", "api_visibility": "private", "show_progress_on": effect}
    for control in (picked, kind):
        control.input(answer, part.inputs, part.outputs, **options)
    if measure is not None:

        def measured() -> tuple[Any, Any]:
            _asked(gr, explorer.measure)
            return gr.update(visible=False), gr.update(visible=True, value="fold")

        measure.click(measured, None, [measure, kind], show_progress_on=heat, api_visibility="private").success(
            answer, part.inputs, part.outputs, **options
        )
    return part


def _chooser(gr: Any, examples: Sequence[Any]) -> Callable[..., Any]:
    def choose(event):  # noqa: ANN001, ANN202
        return examples[event.index]

    choose.__annotations__["event"] = gr.SelectData  # gradio looks for this type to know what to hand over
    return choose


def _asked(gr: Any, question: Callable[..., Any], *words: Any) -> Any:
    """The answer; where the question cannot be answered, the page says why in one line."""
    try:
        return question(*words)
    except InputError as error:
        raise gr.Error(str(error), title="This cannot be shown", print_exception=False) from error
