"""Benchmark splits: data files, prompts and scores."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vpt.data.content_rows import ASK_COUNT_STEPS, ASK_POINT_STEPS
from vpt.errors import DataError, PromptError
from vpt.evaluation.formats.benchmarks import read_aurora, read_released, read_vstar
from vpt.evaluation.formats.own import read_embedded, read_plain
from vpt.evaluation.formats.rows import LETTERS, ask_with_options, offer
from vpt.evaluation.samples import BadRow, ImageRoots, Sample

Reader = Callable[[Path, ImageRoots], Iterator[Sample | BadRow]]
"""``(file, folders of images)`` -> a sample or a bad row for each row, in order.

Raises ``DataError`` if the file cannot be read.
"""

FORMATS: Mapping[str, tuple[Reader, frozenset[str]]] = {
    "released": (read_released, frozenset({"messages"})),
    "vstar": (read_vstar, frozenset({"question_id", "text", "image", "label"})),
    "aurora": (read_aurora, frozenset({"question_id", "text", "image"})),
    "embedded": (read_embedded, frozenset({"image", "question", "mode", "family", "look"})),
    "plain": (read_plain, frozenset({"question"})),
}
"""Name of a format -> its reader, and the keys that identify its first row; order counts."""

_MAX_FIRST_ROW = 2**20  # characters


@dataclass(frozen=True)
class Split:
    """One benchmark split.

    Attributes:
        judged: whether a judge may score it: its published numbers are a judge's, or it is a user's
            file of open questions.
        written_to: where a command of ours writes the file, relative to the working directory.
    """

    name: str  # as on the command line
    about: str
    paper: str
    license: str  # of the questions, as far as published
    how_to_get: str
    format: str  # key of FORMATS
    file: str  # relative to the folder of data
    score: str  # key of SCORES
    prompt: Callable[[Sample], str] = ask_with_options
    max_new_tokens: int = 64  # per answer, calls and content included
    judged: bool = False
    version: int = 1  # increases when prompt, score or reading change the outcome
    elsewhere: tuple[str, ...] = ()  # other places of the file, in the folder of data
    written_to: str = ""
    choices: tuple[str, ...] = ()  # of every question, where the data does not contain them

    def find_file(self, root: Path) -> Path:
        """The path of its file in a folder of data; ``DataError`` says how to get a missing one."""
        places = [root / place for place in (self.file, *self.elsewhere)]
        places += [Path(self.written_to)] if self.written_to else []
        for place in places:
            if place.is_file():
                return place
        looked = " and ".join(map(str, places))
        raise DataError(f"{self.name} is not there: looked for {looked}. {self.how_to_get}".strip())


def ask_as_is(sample: Sample) -> str:
    """The question alone."""
    return sample.question


def ask_for_number(sample: Sample) -> str:
    """The question, and an instruction to answer with a number."""
    return f"{sample.question}\nAnswer with a number."


_HUB = "https://huggingface.co/datasets"
_VPT = f"{_HUB}/rp-yu/VPT_Datasets"
_AURORA = "https://github.com/mahtabbigverdi/Aurora-perception"

_OURS = "Apache-2.0 (this project)"

_WITH_CONTENT = 320
"""Tokens for an answer with a depth map (102) or dozens of boxes (4 each) before it."""


def _released(
    name: str, kind: str, score: str, about: str, paper: str, images: str, num_tokens: int = 64
) -> Split:
    """One of the twelve splits of the paper on VPT (arXiv 2502.17425).

    Published for them is a judge's score of the first 1,000 rows; ``score`` needs no judge.
    ``kind`` (``"region"`` or ``"action"``) is part of the file's name; URLs lack ``https://``.
    """
    file = f"{name}_{kind}_test"
    return Split(
        name=name,
        about=about,
        paper=f"https://{paper}",
        license=f"unknown, see {_VPT}",
        how_to_get=(
            f"Download {file}.json from {_VPT}, and its images from https://{images}. "
            "Say where these are with --images FROM=TO."
        ),
        format="released",
        file=f"{file}.json",
        score=score,
        prompt=ask_as_is,
        max_new_tokens=num_tokens,
        judged=True,
        version=2 if score == "contains" else 1,
        elsewhere=(f"{file}_8cut.json",),  # so some are called in the released evaluation
    )


def _hardblink(num_points: int) -> Split:
    name = f"blink_{num_points}pointscenter_questions"
    folder = f"{_AURORA}, Data/evals/hardblink"
    return Split(
        name=f"HardBLINK_{num_points}",
        about=f"which of {num_points} points is the closest to the camera (124)",
        paper="https://arxiv.org/abs/2412.03548",
        license=f"unknown, see {_AURORA}",
        how_to_get=f"Copy questions, answers and images from {folder} into hardblink.",
        format="aurora",
        file=f"hardblink/questions/{name}.jsonl",
        score="multiple_choice",
        max_new_tokens=_WITH_CONTENT,
        version=2,
        elsewhere=("hardblink/questions.jsonl",) if num_points == 3 else (),
        choices=tuple(LETTERS[:num_points]),
    )


def _generated(
    name: str, about: str, file: str, how_to_get: str, license: str = _OURS, **more: Any
) -> Split:
    """A split of images that recipes of ours draw into ``data/embedded``."""
    return Split(
        name=f"embedded_{name}",
        about=about,
        paper="",
        license=license,
        how_to_get=how_to_get,
        file=f"embedded/{file}",
        prompt=ask_as_is,
        written_to=f"data/embedded/{file}",
        **more,
    )


def _drawn_first(name: str, about: str, score: str, words: str, **more: Any) -> tuple[Split, Split]:
    """Two of them for models that draw before they answer: asked as is, and for the steps."""
    how_to_get = "Make it with the data part of recipes/embedded/train.sh."
    file = f"{name.replace('_', '-')}/questions.jsonl"
    more |= {"format": "aurora", "score": score, "max_new_tokens": _WITH_CONTENT}

    def ask_for_steps(sample: Sample) -> str:
        return f"{sample.question} {words}"

    as_is = _generated(name, about, file, how_to_get, **more)
    name, about = f"{as_is.name}_steps", f"{about}, in steps"
    return as_is, replace(as_is, name=name, about=about, prompt=ask_for_steps)


def _embedded_points(num_points: int) -> tuple[Split, Split]:
    name, letters = f"points_{num_points}", tuple(LETTERS[:num_points])
    about = f"which of {num_points} points is the closest, in generated rooms"
    return _drawn_first(name, about, "multiple_choice", ASK_POINT_STEPS, choices=letters)


def _counting(name: str, dataset: str, paper: str, license: str) -> Split:
    """One of the counting splits of the paper on Aurora (arXiv 2412.03548).

    Aurora published no files for them (issue 6 of its repository), so users write them, in the
    layout of HardBLINK. ``dataset`` is on the Hugging Face Hub, ``paper`` an arXiv number.
    """
    folder = name.lower()
    return Split(
        name=name,
        about="number of objects",
        paper=f"https://arxiv.org/abs/{paper}",
        license=license,
        how_to_get=(
            f"Write the counting questions of {_HUB}/{dataset} as {folder}/questions.jsonl "
            '({"question_id", "image", "text"}), their numbers as '
            f'{folder}/answers.jsonl ({{"question_id", "text"}}), and the images into '
            f"{folder}/images."
        ),
        format="aurora",
        file=f"{folder}/questions.jsonl",
        score="count_accuracy",
        prompt=ask_for_number,
        max_new_tokens=_WITH_CONTENT,
        version=2,
    )


_TABLE = (
    _released("DocVQA", "region", "anls", "text in scanned documents (0.9k)",
              "arxiv.org/abs/2007.00398", "www.docvqa.org/datasets/docvqa"),
    _released("TextVQA", "region", "vqa_accuracy", "text in photos (0.5k)",
              "arxiv.org/abs/1904.08920", "textvqa.org"),
    _released("TextCap", "region", "contains", "text in photos, questions made of captions (8.5k)",
              "arxiv.org/abs/2003.12462", "textvqa.org/textcaps"),
    _released("DUDE", "region", "anls", "text on pages of documents (0.6k)",
              "arxiv.org/abs/2305.08455", "huggingface.co/datasets/jordyvl/DUDE_loader"),
    _released("GQA", "region", "contains", "objects and their relations",
              "arxiv.org/abs/1902.09506", "cs.stanford.edu/people/dorarad/gqa/download.html"),
    _released("OI", "region", "contains", "objects and actions in Open Images (1k)",
              "arxiv.org/abs/1811.00982", "github.com/cvdfoundation/open-images-dataset"),
    _released("VSR", "region", "contains", "positions of objects relative to each other (0.4k)",
              "arxiv.org/abs/2205.00363", "github.com/cambridgeltl/visual-spatial-reasoning"),
    _released("CUB_Birds", "action", "contains", "features of birds (0.5k)",
              "www.vision.caltech.edu/datasets/cub_200_2011",
              "data.caltech.edu/records/65de6-vp158"),
    _released("Flickr30k", "action", "caption", "captions of photos (1.5k)",
              "shannon.cs.illinois.edu/DenotationGraph",
              "shannon.cs.illinois.edu/DenotationGraph", 256),
    _released("POPE", "action", "yes_no", "presence of objects, yes or no (3k)",
              "arxiv.org/abs/2305.10355", "cocodataset.org"),
    _released("LLaVA_COCO_free", "action", "caption", "open questions about photos (1k)",
              "arxiv.org/abs/2304.08485", "cocodataset.org", 512),
    _released("LLaVA_COCO_single", "action", "caption", "questions about photos (1k)",
              "arxiv.org/abs/2304.08485", "cocodataset.org", 512),
    _hardblink(3),
    _hardblink(4),
    _hardblink(5),
    _counting("BLINK_count", "BLINK-Benchmark/BLINK", "2404.12390", "Apache-2.0"),
    _counting("CVBench_count", "nyu-visionx/CV-Bench", "2406.16860", "Apache-2.0"),
    _counting("SEED_count", "AILab-CVC/SEED-Bench", "2307.16125", "CC-BY-NC-4.0"),
    Split(
        name="VStar",
        about="small objects in large photos, V*Bench (191)",
        paper="https://arxiv.org/abs/2312.14135",
        license=f"unknown, see {_HUB}/craigwu/vstar_bench",
        how_to_get=(
            f"Download {_HUB}/craigwu/vstar_bench into vstar_bench: questions, images, and beside "
            "each image the file that says where to look."
        ),
        format="vstar",
        file="vstar_bench/test_questions.jsonl",
        score="multiple_choice",
    ),
    _generated(
        "heldout",
        "generated images, held out from the training of the embedded model",
        "heldout.jsonl",
        "Make it with `python -m recipes make-embedded`.",
        f"{_OURS}; the digits in it CC-BY-4.0 (UCI, scikit-learn)",
        format="embedded",
        score="exact_match",
    ),
    *_embedded_points(2),
    *_embedded_points(3),
    *_embedded_points(5),
    *_drawn_first("counting", "how many things of a kind there are, in generated images",
                  "count_accuracy", ASK_COUNT_STEPS),
)  # fmt: skip

SPLITS: Mapping[str, Split] = {split.name: split for split in _TABLE}
"""Registered splits by name, in the order in which they are shown."""

_OWN_SCORES = {"released": "contains", "aurora": "exact_match", "plain": "contains"}


def find_split(name_or_file: str, data_root: Path) -> Split:
    """Look up a registered split, or make one of a user's file.

    ``name_or_file`` is a name, a path, or ``FORMAT:PATH``; a path is relative to the working
    directory, or else to the folder of data.

    Raises:
        PromptError: for an unknown name or format.
        DataError: for a file that does not exist, or whose format cannot be recognised.
    """
    if name_or_file in SPLITS:
        return SPLITS[name_or_file]
    file = existing_file(name_or_file, data_root)
    if not file.is_file():
        form, _, path = name_or_file.partition(":")
        if form in FORMATS and path:
            return _own_split(path, existing_file(path, data_root), form)
        raise _not_found(name_or_file)
    if (guessed := guess_format(file)) is None:
        raise DataError(
            f"the format of {name_or_file} does not show in its first row; name it, as "
            f"plain:{name_or_file}. Formats: {', '.join(FORMATS)}"
        )
    return _own_split(name_or_file, file, guessed)


def guess_format(file: Path) -> str | None:
    """Recognise a format by the name of a file or its first row."""
    if file.suffix == ".parquet":
        return "plain"
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            start = stream.read(_MAX_FIRST_ROW).lstrip()
    except OSError as exc:
        raise DataError(f"cannot read {file}: {exc.strerror or exc}") from exc
    try:
        row, _ = json.JSONDecoder().raw_decode(start.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return None
    keys = set(row) if isinstance(row, dict) else set()
    return next((name for name, (_, needed) in FORMATS.items() if needed <= keys), None)


def is_present(split: Split, root: Path) -> bool:
    """Whether the file of a split exists; its images are not checked."""
    try:
        split.find_file(root)
    except DataError:
        return False
    return True


def read_split(split: Split, root: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read a split: a sample or a bad row for each row, in order, with unique ids."""
    first_with: dict[str, int] = {}
    for number, sample in enumerate(read_rows_of(split, split.find_file(root), images)):
        same = first_with.setdefault(sample.id, number)
        if same == number:
            yield sample
        else:
            problem = f"row {number}: has the id {sample.id} of row {same}"
            yield BadRow(f"{sample.id} (row {number})", problem)


def read_rows_of(split: Split, file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """As :func:`read_split`, but of a given file, and ids may repeat."""
    for number, sample in enumerate(FORMATS[split.format][0](file, images)):
        if isinstance(sample, BadRow) or not split.choices:
            yield sample
            continue
        try:
            yield offer(sample, split.choices)
        except DataError as exc:
            yield BadRow(sample.id, f"row {number}: {exc}")


def existing_file(path: str, data_root: Path) -> Path:
    """The file in the working directory, or else in the folder of data."""
    return Path(path) if Path(path).is_file() else data_root / path


def _own_split(name: str, file: Path, form: str) -> Split:
    """A split of a user's file; its first sample decides about the score."""
    samples = FORMATS[form][0](file, ImageRoots())
    first = next((sample for sample in samples if isinstance(sample, Sample)), None)
    has_choices = first is not None and bool(first.choices)
    return Split(
        name=name,
        about=f"own file, read as {form}",
        paper="",
        license="that of the file",
        how_to_get="",
        format=form,
        file=str(file.absolute()),
        score="multiple_choice" if has_choices else _OWN_SCORES.get(form, "exact_match"),
        judged=not has_choices,
    )


def is_path(name: str) -> bool:
    """Whether a name looks like a path without a format."""
    suffixes = (".json", ".jsonl", ".parquet")
    return ":" not in name and ("/" in name or Path(name).suffix in suffixes)


def _not_found(name: str) -> PromptError | DataError:
    if is_path(name):
        return DataError(f"{name} does not exist; check the path")
    form, colon, _ = name.partition(":")
    if colon:
        return PromptError(f"unknown format {form!r}; available: {', '.join(FORMATS)}")
    names = {split.casefold(): split for split in SPLITS}
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(names[one] for one in close)}?" if close else ";"
    return PromptError(f"unknown split {name!r}{hint} available: {', '.join(SPLITS)}, or a file")
