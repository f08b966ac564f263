"""The Gradio demo: widgets and wiring; what they show is computed from the trace of each run."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache, save_file_to_cache, save_pil_to_cache

import vpt
from vpt.branches import BranchError
from vpt.chat import Chat
from vpt.demo.remote import Model, RemoteChat
from vpt.demo.runs import (
    MOST,
    SETTING_ROWS,
    SETTINGS,
    Caption,
    box_to_edit,
    draw_views,
    make_follow_up,
    make_requests,
    point_on_image,
    read_examples,
    read_settings,
    shown_results,
    watch_live,
)
from vpt.errors import CheckpointError, is_out_of_memory
from vpt.images import DEFAULT_LIMITS
from vpt.inference.events import ContentEvent, ErrorEvent, ResultEvent, TokenEvent
from vpt.inference.request import OPTIONS, Message, Request
from vpt.runtime import Snapshot
from vpt.trace.records import MessageRecord, Trace
from vpt.view.timeline import timeline_html
from vpt.view.wording import MAP_TEXT, cost_text, look_text, printable

EXAMPLES = Path(vpt.__file__).parent / "examples"
AT_ONCE = 4  # questions answered side by side; others wait
MOST_WAITING = 32
KEPT_S = 3600  # files and traces of a visit
CSS = Path(__file__).parent / "page.css"
SHOWN_EVERY_S = 0.1  # while tokens come; showing takes time that the model could use
HEAD = "# VPT Runtime\nAsk about an image, and see the model look again."
WELCOME = (
    '<p class="vpt-hint">The model reads the image once, and small. Where that is not enough, it '
    "writes a perception token: a region to see closer, or an encoder to look with. The "
    "result is appended, and the model continues. You will see each step here.</p>"
)
SLIDERS = {"max_calls": 1, "max_new_tokens": 1, "temperature": 0.05, "top_p": 0.01}
"""Settings that have a slider, with its step."""

HIGHEST_TEMPERATURE = 2  # of the slider
TO_THE_ANSWER = "() => { if (innerWidth < 768) scrollTo(0, 0) }"
ONE_ERROR = """() => {
    const closeOthers = added => document.querySelectorAll(".toast-close").forEach(
        button => added.contains(button) || button.click());
    new MutationObserver(changes => changes.forEach(({addedNodes}) => addedNodes.forEach(
        node => node.querySelector?.(".toast-close") && closeOthers(node)
    ))).observe(document.body, {childList: true, subtree: true});
}"""
HINT = (
    "Is this the right place? Mark two corners on the photo, or type the box in pixels; "
    "then have the model look there."
)


def build_app(model: Model | CheckpointError) -> gr.Blocks:
    """Lay out the page, and wire it to a model, or show why there is none; then it only replays."""
    options = {"analytics_enabled": False, "delete_cache": (KEPT_S, KEPT_S), **_style()[0]}
    with gr.Blocks(title="VPT Runtime", **options) as app:
        gr.Markdown(HEAD, elem_classes="vpt-head")
        if isinstance(model, CheckpointError):
            reason = escape(printable(str(model)))
            words = f"**There is no model to ask.** {reason} Saved traces can be replayed."
            gr.Markdown(words, elem_classes="vpt-problem")
        with gr.Row(elem_id="page"):  # page.css lays its columns out
            inputs, outputs = _Inputs(), _Outputs()
        _wire(inputs, outputs, model)
        app.load(None, js=ONE_ERROR, api_name="one_error")
    app.queue(max_size=MOST_WAITING, default_concurrency_limit=AT_ONCE)
    return app


class _Inputs:
    """The widgets of a question: examples, image, text, settings."""

    def __init__(self) -> None:
        with gr.Column(elem_id="examples", min_width=0):
            self._add_examples()
        with gr.Column(elem_id="inputs", min_width=0):
            self._add_question()
            self.upload = gr.UploadButton("Replay a trace", elem_id="replay", file_types=[".json"])

    def _add_question(self) -> None:
        self.picture = gr.Image(
            type="filepath", label="Image", sources=["upload", "clipboard"], height=230
        )
        # Gradio would open the file itself, without limits and without words for what is wrong.
        self.picture.preprocess = lambda payload: payload and payload.path
        self.question = gr.Textbox(label="Question", placeholder="What number is on the blue one?")
        place = "the blue tag (optional: looks there first)"
        self.look_for = gr.Textbox(label="Look for", placeholder=place)
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=120)
        self.compare = gr.Checkbox(label="Compare with an answer without looking again")
        with gr.Accordion("Settings", open=False):
            self.settings = []  # in the order of SETTINGS
            for names in SETTING_ROWS:
                with gr.Row():
                    self.settings += [_setting_widget(name) for name in names]

    def _add_examples(self) -> None:
        self.examples = read_examples(EXAMPLES)
        rows = [[str(EXAMPLES / one.picture), one.question, one.takes] for one in self.examples]
        self.gallery = gr.Dataset(
            label="Examples: click one",
            components=[gr.Image(visible=False), *(gr.Textbox(visible=False) for _ in range(2))],
            headers=["image", "question", "it takes"],
            samples=rows,
            type="index",
            visible=bool(rows),
            elem_classes="vpt-examples",
            samples_per_page=len(rows) or 1,
        )

    @property
    def all(self) -> list[Any]:
        """In the order of the handlers' arguments."""
        return [self.picture, self.question, self.compare, self.look_for, *self.settings]


def _setting_widget(name: str) -> Any:
    option = OPTIONS[name]
    about = {"value": option.default, "label": option.label}
    if option.choices:
        return gr.Radio(list(option.choices), **about)
    if option.kind is bool:
        return gr.Checkbox(**about)
    if name not in SLIDERS:
        return gr.Number(**about, precision=0, minimum=option.least)
    low = SLIDERS[name] if option.excludes_least else option.least
    high = MOST.get(name, min(option.most, HIGHEST_TEMPERATURE))
    slider = gr.Slider(low, high, step=SLIDERS[name], **about)
    # Gradio would compare an empty field with the bounds, and fail without words.
    slider.preprocess = lambda payload: payload
    return slider


class _Outputs:
    """The widgets of a run."""

    def __init__(self) -> None:
        self.trace = gr.State(None, time_to_live=KEPT_S)
        self.corner = gr.State(None)
        self.chat = gr.State(None, time_to_live=KEPT_S)
        with gr.Column(elem_id="outcome", min_width=0, visible=False) as self.outcome_side:
            self.notes = gr.HTML(elem_id="notes", padding=False)
            self.earlier = gr.HTML(elem_id="earlier", padding=False)
            with gr.Row():
                lines: dict[str, Any] = {"lines": 1, "elem_classes": "vpt-answer"}
                self.answer = gr.Textbox(label="Answer", elem_id="answer", **lines)
                with gr.Column(visible=False, min_width=120) as self.plain_side:
                    label = "Without looking again"
                    self.plain = gr.Textbox(label=label, elem_id="plain", **lines)
            self.looked = gr.HTML(elem_id="looked", padding=False)
            with gr.Row(visible=False, elem_id="follow-up") as self.follow_side:
                words = {"label": "Follow-up question", "placeholder": "And the green one?"}
                self.follow = gr.Textbox(**words, lines=1, scale=3, min_width=160)
                self.ask_further = gr.Button("Ask further", elem_id="ask-further", min_width=120)
        with gr.Column(elem_id="details", min_width=0):
            self._add_details()

    def _add_details(self) -> None:
        kinds = {"photo": gr.Image, "first": gr.Image, "crop": gr.Image, "heat": gr.ImageSlider}
        self.pictures: dict[str, Any] = {}
        self.captions: dict[str, Any] = {}
        self.picture_sides: dict[str, Any] = {}
        with gr.Row():
            for name, kind in kinds.items():
                with gr.Column(visible=False, min_width=140) as self.picture_sides[name]:
                    self.pictures[name] = _picture(kind, elem_id=name)
                    self.captions[name] = gr.HTML(elem_id=f"{name}-caption", padding=False)
        self.about = gr.HTML(elem_id="about-map", elem_classes="vpt-hint", padding=False)
        with gr.Column(visible=False) as self.choice_side:
            self.results = gr.Radio([], label="Show result", elem_id="looks")
        self.stream = gr.HTML(WELCOME, elem_id="stream")
        with gr.Column(visible=False) as self.after_side:
            with gr.Accordion("Look somewhere else", open=False, elem_id="elsewhere"):
                gr.Markdown(HINT, elem_classes="vpt-hint")
                with gr.Row():
                    names = ("left", "top", "right", "bottom")
                    self.box = [gr.Number(label=name, minimum=0, min_width=70) for name in names]
                self.look_there = gr.Button("Answer from this box", elem_id="look-there")
            self.download = gr.DownloadButton("Download trace", elem_id="download")

    @property
    def drawn(self) -> list[Any]:
        """The pictures with all that belongs to them."""
        return [
            *self.pictures.values(),
            *self.captions.values(),
            *self.picture_sides.values(),
            self.about,
        ]

    @property
    def all(self) -> list[Any]:
        """Everything that a run changes; programs get it in this order."""
        photo, first, *results = self.pictures.values()
        shown = [self.answer, self.plain, self.stream, photo, *results, self.download, first]
        sides = [self.outcome_side, self.plain_side, *self.picture_sides.values()]
        sides += [self.choice_side, self.after_side, self.follow_side]
        words = [self.notes, self.looked, *self.captions.values(), self.about, self.earlier]
        states = [self.trace, self.corner, self.chat]
        return [*shown, *words, self.follow, self.results, *self.box, *sides, *states]

    def draw(self, trace: Trace, number: int | None = None) -> dict[Any, Any]:
        """Photo and first look, and the result of the chosen call or the chosen depth map."""
        views = draw_views(trace, number)
        new = {self.about: MAP_TEXT if views.is_score_map else ""}
        for name, picture in self.pictures.items():
            new[picture] = self.stored(getattr(views, name))
            new[self.captions[name]] = caption_html(views.captions.get(name))
            new[self.picture_sides[name]] = gr.Column(visible=name in views.captions)
        return new

    def stored(self, picture: Any) -> Any:
        """A picture, or a pair of them, as files of no other answer.

        Gradio names the file of a picture by its content and writes it anew for each answer,
        also while another browser reads it.
        """
        if isinstance(picture, tuple):
            return tuple(map(self.stored, picture))
        name = f"image-{uuid4().hex}"
        return picture and save_pil_to_cache(picture, self.download.GRADIO_CACHE, name, "png")

    def whole(self, trace: Trace) -> dict[Any, Any]:
        """Everything of a run that has ended, but for the answer without calls."""
        pictures = self.draw(trace)
        results = shown_results(trace)
        last = results[-1][1] if results else None
        file = save_bytes_to_cache(
            trace.to_json().encode(errors="backslashreplace"),
            "trace.json",
            self.download.GRADIO_CACHE,
        )
        return {
            **pictures,
            self.outcome_side: gr.Column(visible=True),
            self.notes: notes_html(trace),
            self.earlier: earlier_html(trace.history, trace.question),
            self.looked: _html(f"{look_text(trace)} {cost_text(trace.counts)}"),
            self.answer: printable(trace.answer) or "(nothing)",
            self.stream: timeline_html(trace),
            self.results: gr.Radio(choices=results, value=last),
            self.choice_side: gr.Column(visible=len(results) > 1),
            self.after_side: gr.Column(visible=True),
            **dict(zip(self.box, box_to_edit(trace) or [None] * 4, strict=True)),
            self.download: file,
            self.trace: trace,
            self.corner: None,
        }


def _picture(kind: Any, **options: Any) -> Any:
    """A widget that shows a picture, without the button that would publish it."""
    if "buttons" in inspect.signature(kind).parameters:  # gradio 6
        options["buttons"] = ["download", "fullscreen"]
    elif kind is gr.Image:
        options["show_share_button"] = False
    return kind(
        show_label=False, interactive=False, format="png", min_width=140, container=False, **options
    )


def notes_html(trace: Trace) -> str:
    """Warnings of a run."""
    return "".join(
        f'<p class="vpt-problem" role="alert">{_html(one)}</p>' for one in trace.warnings
    )


def earlier_html(history: Sequence[Message | MessageRecord], question: str) -> str:
    """The chat up to the question; empty for its first."""
    if not history:
        return ""
    turns = [*((one.role, one.text) for one in history), ("user", question)]
    lines = (f'<li class="{_html(role)}">{_html(text) or "(nothing)"}</li>' for role, text in turns)
    return f'<ol class="vpt-earlier" aria-label="Chat">{"".join(lines)}</ol>'


def caption_html(caption: Caption | None) -> str:
    """Text under a picture, with the colour scale of a map."""
    if caption is None:
        return ""
    ramp = ""
    if caption.ends:
        low, high = map(_html, caption.ends)
        ramp = f'<span class="ends">{low}<span class="ramp"></span>{high}</span>'
    words = f"<b>{_html(caption.title)}</b> {_html(caption.text)}"
    return f'<div class="vpt-caption">{ramp}{words}</div>'


def _html(text: str) -> str:
    return escape(printable(text))


def _wire(inputs: _Inputs, outputs: _Outputs, model: Model | CheckpointError) -> None:
    """Connect the events of widgets with their handlers."""
    handlers = _Handlers(outputs, model)
    shown = {"outputs": outputs.all, "show_progress": "hidden"}
    ask = [inputs.ask.click, inputs.question.submit, inputs.look_for.submit]
    asked = gr.on(ask, handlers.ask, inputs.all, api_name="ask", **shown)
    looked = outputs.look_there.click(
        handlers.ask, [*inputs.all, *outputs.box], api_name="look_there", **shown
    )
    followed = gr.on(
        [outputs.ask_further.click, outputs.follow.submit],
        handlers.follow_up,
        [outputs.chat, outputs.follow, *inputs.settings],
        api_name="follow_up",
        **shown,
    )
    inputs.upload.upload(handlers.replay, inputs.upload, api_name="replay", **shown)
    forgotten = [outputs.chat, outputs.follow_side]
    inputs.picture.input(
        handlers.forget, None, forgotten, show_progress="hidden", api_name="forget"
    )

    def take(index: int) -> tuple[str, str, str]:
        example = inputs.examples[index]
        path = EXAMPLES / example.picture
        return save_file_to_cache(path, inputs.picture.GRADIO_CACHE), example.question, ""

    example = inputs.gallery.click(
        take,
        inputs.gallery,
        [inputs.picture, inputs.question, inputs.look_for],
        api_name="take_example",
    ).then(handlers.ask, inputs.all, api_name="ask_example", **shown)
    starts = [
        *ask,
        inputs.gallery.click,
        outputs.ask_further.click,
        outputs.look_there.click,
        inputs.upload.upload,
    ]
    gr.on(starts, None, js=TO_THE_ANSWER, api_name="to_the_answer")
    inputs.stop.click(None, cancels=[asked, looked, example, followed], api_name="stop")
    chosen, photo = [outputs.trace, outputs.results], outputs.pictures["photo"]
    outputs.results.input(handlers.choose, chosen, outputs.drawn, api_name="choose_look")
    photo.select(
        handlers.mark,
        [outputs.trace, outputs.corner],
        [photo, outputs.corner, *outputs.box],
        show_progress="hidden",
        api_name="mark",
    )
    gr.on(
        [side.input for side in outputs.box],
        handlers.draw_box,
        [outputs.trace, *outputs.box],
        photo,
        show_progress="hidden",
        api_name="draw_box",
    )


@contextlib.contextmanager
def _error_message() -> Iterator[None]:
    """Show errors made on purpose as messages on the page, which takes them for HTML."""
    try:
        yield
    except (vpt.VPTError, BranchError, MemoryError, RuntimeError) as exc:
        if is_out_of_memory(exc):
            raise gr.Error("out of memory: try a smaller image", print_exception=False) from exc
        if not isinstance(exc, vpt.VPTError | BranchError):
            raise
        words = escape(printable(str(exc)), quote=False)
        raise gr.Error(words, print_exception=False) from exc


class _Handlers:
    """Handlers of the events of the page; each yields or returns new values of widgets."""

    def __init__(self, outputs: _Outputs, model: Model | CheckpointError) -> None:
        self.outputs, self.model = outputs, model

    def ask(
        self, picture: str | None, question: str, compare: bool, look_for: str, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Answer with settings, the first of ``values``, and a box to look at, the rest if any."""
        out, box = self.outputs, values[len(SETTINGS) :] or None
        with _error_message():
            if isinstance(self.model, CheckpointError):
                raise CheckpointError(f"there is no model to ask: {self.model}")
            settings = read_settings(values[: len(SETTINGS)])
            requests = make_requests(
                self.model,
                picture,
                question,
                settings,
                compare=compare,
                look_for=look_for,
                box=box,
            )
            chat = self.model.chat()
            yield {out.chat: chat, out.follow_side: gr.Row(visible=False)}
            yield from self._answer(chat, requests)

    def follow_up(
        self, chat: Chat | RemoteChat | None, question: str, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Answer a question that continues the chat of this page."""
        with _error_message():
            request = make_follow_up(chat, question, read_settings(values))
            assert chat is not None  # else it is refused
            yield from self._answer(chat, [request])

    def forget(self) -> dict[Any, Any]:
        """End the chat of this page."""
        return {self.outputs.chat: None, self.outputs.follow_side: gr.Row(visible=False)}

    def _answer(
        self, chat: Chat | RemoteChat, requests: Sequence[Request]
    ) -> Iterator[dict[Any, Any]]:
        """Answer the first as the next of a chat, another one outside of it."""
        out, first = self.outputs, requests[0]
        yield {
            **dict.fromkeys((out.answer, out.plain)),
            **dict.fromkeys(out.picture_sides.values(), gr.Column(visible=False)),
            **dict.fromkeys((out.notes, out.looked, out.about, out.follow), ""),
            out.earlier: earlier_html(first.history, first.question),
            out.outcome_side: gr.Column(visible=True),
            out.plain_side: gr.Column(visible=len(requests) > 1),
            out.choice_side: gr.Column(visible=False),
            out.after_side: gr.Column(visible=False),
        }
        with contextlib.closing(watch_live(chat.watch(*requests))) as snapshots:
            yield from self._show(snapshots)

    def _show(self, snapshots: Iterator[Snapshot]) -> Iterator[dict[Any, Any]]:
        """Runs as they happen, and at the end everything: programs get the last only."""
        out, shown_at, is_drawn = self.outputs, 0.0, False
        traces: dict[int, Trace] = {}
        errors: dict[int, vpt.VPTError] = {}
        for one in snapshots:
            assert one.trace is not None  # the requests are checked
            traces[one.index] = one.trace
            if isinstance(one.event, ErrorEvent):
                errors[one.index] = one.event.error
            is_early = time.monotonic() < shown_at + SHOWN_EVERY_S
            if isinstance(one.event, TokenEvent) and is_early:
                continue
            shown_at, answer = time.monotonic(), printable(one.trace.answer)
            if one.index:
                yield {out.plain: answer}
                continue
            has_more = not is_drawn or isinstance(one.event, ContentEvent | ResultEvent)
            is_drawn = True
            pictures = out.draw(one.trace) if has_more else {}
            yield {**pictures, out.answer: answer, out.stream: timeline_html(one.trace)}
        plain = printable(traces[1].answer) if 1 in traces else ""
        can_follow = {out.follow_side: gr.Row(visible=True)}
        yield {**({} if 0 in errors else out.whole(traces[0]) | can_follow), out.plain: plain}
        for error in errors.values():
            raise error

    def replay(self, file: str) -> dict[Any, Any]:
        with _error_message():
            hidden = {self.outputs.plain: "", self.outputs.plain_side: gr.Column(visible=False)}
            return {**self.outputs.whole(Trace.load(file)), **hidden, **self.forget()}

    def choose(self, trace: Trace | None, number: int) -> dict[Any, Any]:
        with _error_message():
            return {} if trace is None else self.outputs.draw(trace, number)

    def mark(
        self, trace: Trace | None, corner: tuple[float, float] | None, event: gr.SelectData
    ) -> dict[Any, Any]:
        out = self.outputs
        if trace is None:
            return {out.corner: None}
        with _error_message():
            x, y = point_on_image(trace, event.index)
            x0, y0 = corner or (x, y)
            box = (min(x0, x), min(y0, y), max(x0, x), max(y0, y))
            photo = out.stored(draw_views(trace, drawn_box=box).photo)
        if corner is None:
            return {out.pictures["photo"]: photo, out.corner: (x, y)}
        numbers = dict(zip(out.box, map(round, box), strict=True))
        return {out.pictures["photo"]: photo, out.corner: None, **numbers}

    def draw_box(self, trace: Trace | None, *box: float | None) -> Any:
        sides = [side for side in box if side is not None]
        if trace is None or len(sides) != 4:
            return gr.skip()
        x0, y0, x1, y1 = sides
        if x0 >= x1 or y0 >= y1:
            return gr.skip()
        with _error_message():
            return self.outputs.stored(draw_views(trace, drawn_box=(x0, y0, x1, y1)).photo)


def _style() -> tuple[dict[str, Any], dict[str, Any]]:
    """Theme and style sheet, for the page and for its launch: gradio 6 takes them at the latter."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    style = {"theme": gr.themes.Soft(**fonts), "css_paths": str(CSS)}
    is_at_launch = "theme" in inspect.signature(gr.Blocks.launch).parameters
    return ({}, style) if is_at_launch else (style, {})


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Launch the page, with what all launches have in common."""
    return app.launch(
        **_style()[1],
        show_error=False,
        ssr_mode=False,
        max_file_size=DEFAULT_LIMITS.max_bytes,
        state_session_capacity=100,
        **options,
    )


def serve(model: Model | CheckpointError, host: str, port: int, *, share: bool = False) -> None:
    """Serve the page until it is ended; what was uploaded is removed then, at SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parent = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="vpt-demo-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # the only way to name it
        launch(build_app(model), server_name=host, server_port=port, share=share)
