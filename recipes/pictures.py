"""``python -m recipes draw-docs``: pictures of the documentation, as the program draws today."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.model import quieten
from vpt.cli.output import print_err
from vpt.cli.parser import Command, add_path
from vpt.errors import PromptError

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LOG = ROOT / "models" / "embedded" / "3-language" / "language.jsonl"
CURVES = {
    "questions": ("instructions", "looks", "easy"),
    "listings": ("captions", "all_boxes", "all_points"),
    "drawing and direct answers": ("count_direct", "count_steps", "depth_direct", "depth_steps"),
}
"""Files of rows whose accuracies :data:`LOG` has, by the title of their panel."""

POLICIES = ROOT / "saves"
POLICY_RUNS = {"policy": "rewards", "policy-control": "shuffled rewards"}
"""Folders of policy trainings under :data:`POLICIES`, with their titles."""
POLICY_FIGURES = {
    "score": "accuracy, held out",
    "gain": "gain over calls forbidden",
    "called": "share of questions with a call",
}
"""Figures of their evaluations, with their titles."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WRONG = (("sam", "pattern"), ("region", "pattern"), ("dino", "lines"), ("region", "number"))
_NUM_HELDOUT = 60  # scenes to search for wrong answers
_PAGE_WH = (1100, 900)
_WAIT_MS = 120_000


class _LeftOut(Exception):  # noqa: N818 - a picture that cannot be drawn here is no error
    """Why a picture is not drawn."""


def draw_look() -> Image.Image:
    """Draw what ``vpt ask --picture`` draws of the README's question."""
    import vpt

    return _asked(vpt.load(device="cpu"), EXAMPLES / "tags.jpg", "What number is on the blue one?")


def draw_boxes() -> Image.Image:
    """Draw what ``vpt ask --picture`` draws of the example that takes boxes."""
    return _example("boxes")


def draw_depth_map() -> Image.Image:
    """Draw what ``vpt ask --picture`` draws of the example that takes a depth map."""
    return _example("a depth map")


def _example(taken: str) -> Image.Image:
    import vpt
    from vpt.demo.runs import read_examples

    (one,) = [one for one in read_examples(EXAMPLES) if one.takes.endswith(taken)]
    return _asked(vpt.load(device="cpu"), EXAMPLES / one.picture, one.question)


def draw_examples() -> Image.Image:
    """Draw one example of each kind side by side: tags, boards, things."""
    from vpt.images import load_image
    from vpt.view.picture import grid

    paths = [EXAMPLES / f"{name}.jpg" for name in ("tags", "boards", "things")]
    return grid([load_image(path).pixels for path in paths], columns=3, gap=10)


def draw_wrong() -> Image.Image:
    """Draw the first held-out question of each kind that is answered wrongly."""
    import vpt
    from vpt.view.picture import grid

    runtime = vpt.load(device="cpu")
    found: dict[tuple[str, str], Image.Image] = {}
    with tempfile.TemporaryDirectory() as folder:
        for entry in _heldout_questions(Path(folder)):
            kind = entry["mode"], entry["family"]
            if kind not in _WRONG or kind in found:
                continue
            path, question = Path(folder, entry["image"]), entry["question"]
            if runtime.ask(path, question).text != entry["answer"]:
                found[kind] = _asked(runtime, path, question)
    drawings = [found[kind] for kind in _WRONG if kind in found]
    return grid([one.resize((648, 648 * one.height // one.width)) for one in drawings], 2, gap=4)


def draw_learning() -> Image.Image:
    """Draw how many tokens of held-out rows are predicted, from the log of the training."""
    if not LOG.is_file():
        raise _LeftOut(f"needs the training of configs/embedded; there is no {LOG}")
    _needs("matplotlib")
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11.25, 3), dpi=100, layout="constrained")
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name in names:
            known = [line for line in lines if f"accuracy_{name}" in line]
            values = [line[f"accuracy_{name}"] for line in known]
            axes.plot([line["step"] for line in known], values, label=name)
        axes.set(title=title, xlabel="step", ylabel="right tokens, held out", ylim=(0, 1))
        axes.locator_params(axis="x", nbins=4)
        axes.label_outer()
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def draw_policy() -> Image.Image:
    """Draw the evaluations of the policy training and its control, from the logs that they left."""
    logs = {title: POLICIES / name / "trainer_log.jsonl" for name, title in POLICY_RUNS.items()}
    if missing := [path for path in logs.values() if not path.is_file()]:
        raise _LeftOut(f"needs the runs of configs/policy/embedded.yaml; there is no {missing[0]}")
    _needs("matplotlib")
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11.25, 3), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(POLICY_FIGURES))
    for title, path in logs.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line["kind"] == "eval"]
        at = [line["step"] for line in steps]
        for axes, (name, label) in zip(panels, POLICY_FIGURES.items(), strict=True):
            values = [line[name] for line in steps]
            if isinstance(values[0], dict):
                low, high = ([one[end] for one in values] for end in ("low", "high"))
                axes.fill_between(at, low, high, alpha=0.2)
                values = [one["mean"] for one in values]
            axes.plot(at, values, label=title)
            axes.set(title=label, xlabel="step", ylim=(-0.05, 1))
            axes.grid(alpha=0.3)
    panels[1].legend(loc="upper right")
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def draw_counting() -> Image.Image:
    """Draw counting scenes, and others with the boxes of the kind that is asked about."""
    from PIL import ImageDraw

    from recipes.counting.scenes import draw_counting_scene
    from vpt.view.picture import grid

    scenes = [draw_counting_scene(0, number, size_px=224) for number in range(8)]
    for scene in scenes[4:]:
        pen = ImageDraw.Draw(scene.image)
        for thing in scene.things:
            if thing.kind == scene.things[0].kind:
                pen.rectangle(thing.box, outline="white")
    return grid([scene.image for scene in scenes], columns=4, gap=4)


def draw_marked_points() -> Image.Image:
    """Draw marked points on generated scenes, spread out, then in HardBLINK's layout."""
    import numpy as np

    from recipes.scenes.rendering import draw_scene
    from vpt.data.points import PointRule, draw_points, place_points
    from vpt.errors import DataError
    from vpt.view.picture import grid

    marked: list[Image.Image] = []
    for layout, counts in (("spread", (5, 5, 5, 4)), ("centre", (3, 3, 3, 3))):
        numbers = iter(range(100))
        for count in counts:
            for number in numbers:
                scene, rng = draw_scene(0, number, size_px=224), np.random.default_rng(number)
                try:
                    points = place_points(scene.depth, count, PointRule(layout), rng)
                except DataError:  # no room for as many in this scene
                    continue
                marked.append(draw_points(scene.image, points, scale=1.5))
                break
    return grid(marked, columns=4, gap=4)


def draw_demo_region() -> Image.Image:
    """Take a screenshot of the demo after a region call."""
    return _screenshot("What number is on the blue one?", "light")


def draw_demo_reencoding() -> Image.Image:
    """Take a screenshot of the dark demo after a re-encoding, with the answer without calls."""
    return _screenshot("What shape is the black one?", "dark", compare=True)


DRAWINGS: Mapping[str, Callable[[], Image.Image]] = {
    "look.jpg": draw_look,
    "embedded/boxes.jpg": draw_boxes,
    "embedded/depth.jpg": draw_depth_map,
    "demo/region.jpg": draw_demo_region,
    "demo/reencoding-dark.jpg": draw_demo_reencoding,
    "embedded/pictures.jpg": draw_examples,
    "embedded/wrong.jpg": draw_wrong,
    "embedded/learning.png": draw_learning,
    "embedded/policy.png": draw_policy,
    "aurora/points.jpg": draw_marked_points,
    "aurora/counting.jpg": draw_counting,
}
"""Pictures under ``docs`` that need no model but the shipped one, and no data."""


def _asked(runtime: Any, path: Path, question: str) -> Image.Image:
    from vpt.images import load_image
    from vpt.view.picture import draw

    image = load_image(path)
    return draw(runtime.ask(image, question).trace, [image.pixels])


def _heldout_questions(folder: Path) -> Iterator[dict[str, Any]]:
    _needs("sklearn")
    from recipes.embedded.make import PARTS, make_part

    part = next(part for part in PARTS if part.name == "heldout")
    for _ in make_part(dataclasses.replace(part, num_scenes=_NUM_HELDOUT), folder, 1):
        pass
    with (folder / "heldout.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _screenshot(question: str, scheme: str, *, compare: bool = False) -> Image.Image:
    """Take a screenshot of the demo after a click on an example."""
    from PIL import Image

    size = {"width": _PAGE_WH[0], "height": _PAGE_WH[1]}
    with _demo() as url, _browser() as browser:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.set_default_timeout(_WAIT_MS)
        page.goto(url)
        if compare:
            page.get_by_label("Compare with an answer without looking again").check()
        page.get_by_text(question, exact=True).first.click()
        page.locator("#download").wait_for()  # the run has ended, and all of it is shown
        if compare:
            page.wait_for_function("document.querySelector('#plain textarea')?.value")
        page.get_by_text("Download trace", exact=True).wait_for()  # it comes last
        page.wait_for_timeout(3000)  # until pictures have faded in
        return Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")


@contextmanager
def _demo() -> Iterator[str]:
    _needs("gradio")
    import vpt
    from vpt.demo.page import build_app, launch

    app = build_app(vpt.load(device="cpu"))
    _, url, _ = launch(app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        yield url
    finally:
        app.close(verbose=False)


@contextmanager
def _browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        raise _LeftOut(f"needs one of {', '.join(_BROWSERS)}")
    playwright = _needs("playwright.sync_api")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=["--no-sandbox"])


def _needs(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as exc:
        raise _LeftOut(f"needs the package {package.partition('.')[0]}") from exc


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"only these: {', '.join(DRAWINGS)}"
    parser.add_argument("names", nargs="*", metavar="PICTURE", help=names)
    add_path(parser, "--out", "DIR", "folder to write (default: docs)", default=ROOT / "docs")


def _draw(args: argparse.Namespace) -> None:
    if unknown := sorted(set(args.names) - set(DRAWINGS)):
        raise PromptError(f"unknown picture {unknown[0]!r}; available: {', '.join(DRAWINGS)}")
    quieten(args)
    for name in args.names or DRAWINGS:
        try:
            picture = DRAWINGS[name]()
        except _LeftOut as reason:
            print_err(f"left out: {name}: {reason}")
            continue
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(args.out / name, quality=88)
        print_err(f"drew {args.out / name}, {picture.width}x{picture.height} px")


COMMAND = Command(
    help="draw the pictures of the documentation",
    description=(
        "Draw the pictures in docs/ with the program as it is. Pictures that cannot be drawn here\n"
        "stay as they are, and the reason is reported. recipes/README.md lists the commands that\n"
        "draw the pictures of an experiment's models."
    ),
    examples="example:\n  python -m recipes draw-docs\n  python -m recipes draw-docs look.jpg",
    add_arguments=_add_arguments,
    run=_draw,
)
