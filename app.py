"""The Gradio demo: one image, one question, the answer and a picture of how it came about."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

import vpt
from vpt.picture import draw
from vpt.tokens import PERCEPTION_MODES
from vpt.wording import printable


def build_app(runtime: vpt.Runtime) -> gr.Blocks:
    """Wire widgets to a runtime.

    Args:
        runtime: answers all questions, one at a time.
    """

    def ask(
        image: Image.Image | None, question: str, perception: str
    ) -> Iterator[tuple[str, Image.Image | None]]:
        images, text = [] if image is None else [vpt.load_image(image)], ""
        try:
            for event in runtime.stream(images, question, perception=perception):
                if isinstance(event, vpt.TokenEvent):
                    text += printable(event.text)
                    yield text, None
                elif isinstance(event, vpt.StopEvent):
                    drawn = draw(event.trace, [image.pixels for image in images])
                    yield printable(event.trace.answer), drawn
        except vpt.VPTError as exc:
            raise gr.Error(str(exc)) from exc

    with gr.Blocks(title="VPT Runtime") as app:
        gr.Markdown("# VPT Runtime\nA model that decides by itself to look again.")
        with gr.Row():
            image = gr.Image(type="pil", label="Image")
            with gr.Column():
                question = gr.Textbox(label="Question", lines=2)
                perception = gr.Radio(list(PERCEPTION_MODES), value="auto", label="Look again")
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", lines=4)
        picture = gr.Image(label="How it came about", format="png")
        given: Any = [image, question, perception]
        gr.on([button.click, question.submit], ask, given, [answer, picture], api_name="ask")
    return app


def main() -> None:
    """Load a model and serve the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; by default the embedded one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    build_app(vpt.load(args.model)).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
