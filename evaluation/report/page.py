"""The pages: the report of a run, and the comparison of two, each as one HTML file.

A page needs nothing beside it, and runs no foreign script.
"""

from __future__ import annotations

import base64
import hashlib
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from markupsafe import Markup

from vpt.errors import DataError
from vpt.evaluation.compare import Comparison, SamplePair
from vpt.evaluation.records import Record
from vpt.evaluation.report.cards import (
    VERDICT_WORDS,
    Card,
    CardMaker,
    PhotoSource,
    PictureTable,
    open_by_name,
    verdict_of,
)
from vpt.evaluation.report.overview import axis_around_zero, overview_of
from vpt.evaluation.results import BASELINE
from vpt.files import write_atomic
from vpt.view.wording import html_environment, public_text

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_NAME = "report.html"
PAGE_SIZE = 24
MOST_CHARACTERS = 2000
SEED = 0
_MINUS, _NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
_CHANGES = {"better": "became better", "worse": "became worse", "same": "same score"}
_FILTERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "split": ("Split", {}),
    "condition": ("Condition", {}),
    "verdict": ("Answer", VERDICT_WORDS),
    "called": ("Looked again", {"yes": "called", "no": "did not call"}),
    "change": ("Compared with “none”", _CHANGES),
    "fate": ("Change", {}),
    "group": ("Group", {}),
}
"""Name of a fact -> label of its filter, and words for its values."""

Item = TypeVar("Item")


def write_report(
    results: Mapping[str, Any],
    records: Iterable[Record],
    folder: Path,
    max_samples: int = 400,
    *,
    open_photos: PhotoSource = open_by_name,
) -> Path:
    """Write ``report.html`` into an existing folder; raises ``DataError`` if it cannot be written.

    ``results`` are as in ``results.json``. Records are read once, and no more than ``2 *
    max_samples`` are held: the gallery spreads its samples evenly over splits, conditions, and
    right or wrong. ``open_photos`` returns the images of a sample whose names are not paths.
    """
    pictures = PictureTable()
    scores = {entry["split"]: entry["score"] for entry in results["splits"]}
    choice: EvenChoice[Record] = EvenChoice(max_samples)
    baselines: dict[tuple[str, str], float] = {}
    for record in records:
        score = scores.get(record.split, "")
        if record.condition == BASELINE and score in record.scores:
            baselines[record.split, record.id] = record.scores[score]
        group = (record.split, record.condition, verdict_of(record, score))
        choice.offer(group, f"{record.split} {record.id}", record)
    maker = CardMaker(open_photos, pictures)
    entries = []
    for record in sorted(choice.chosen(), key=lambda record: (record.split, record.id)):
        baseline = baselines.get((record.split, record.id))
        if record.condition == BASELINE:
            baseline = None
        card = maker.make(record, scores.get(record.split, ""), baseline)
        entries.append((card, _facts(card)))
    gallery = make_gallery(entries, choice.num_offered)
    content = {"results": results, "overview": overview_of(results), "gallery": gallery}
    return _write_page("report.html", folder / REPORT_NAME, pictures, content)


def _facts(card: Card) -> dict[str, str]:
    return {
        "split": public_text(card.record.split),
        "condition": card.record.condition,
        "verdict": card.verdict,
        "called": card.called,
        "change": card.change,
        "group": card.record.group,
    }


def write_comparison(
    comparison: Comparison,
    path: Path,
    max_samples: int = 400,
    *,
    open_photos: PhotoSource = open_by_name,
) -> Path:
    """Write a comparison of two runs as one HTML file; raises ``DataError`` if it cannot.

    The gallery spreads ``max_samples`` evenly over splits, conditions, and fixed or broken.
    ``open_photos`` returns the images of a sample whose names are not paths.
    """
    choice: EvenChoice[SamplePair] = EvenChoice(max_samples)
    for sample in comparison.changed:
        group = (sample.a.split, sample.a.condition, sample.fate)
        choice.offer(group, f"{sample.a.split} {sample.a.id}", sample)
    pictures = PictureTable()
    maker = CardMaker(open_photos, pictures)
    entries = []
    for sample in sorted(choice.chosen(), key=lambda sample: (sample.a.split, sample.a.id)):
        cards = maker.make(sample.a, sample.score), maker.make(sample.b, sample.score)
        known = {name: _facts(cards[0])[name] for name in ("split", "condition", "group")}
        entries.append(((sample.fate, *cards), {"fate": sample.fate, **known}))
    differences = [row.difference for row in comparison.splits]
    content = {
        "comparison": comparison,
        "axis": axis_around_zero(end for d in differences for end in (d.low, d.high)),
        "gallery": make_gallery(entries, choice.num_offered),
    }
    return _write_page("compare.html", path, pictures, content)


# --- the gallery ------------------------------------------------------------------------------


class EvenChoice(Generic[Item]):
    """Takes items one by one and keeps ``most`` of them; up to twice as many are held meanwhile.

    Each group ends with as many items as every other, as far as it has them. Within a group those
    stay whose key has the lowest hash: the same keys in each group, so that a sample is shown
    under all conditions or none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_offered = 0
        self._groups: dict[Hashable, list[tuple[str, Item]]] = defaultdict(list)
        self._num_held = 0

    def offer(self, group: Hashable, key: str, item: Item) -> None:
        """Take an item of a group, or pass it over; the hash of its key decides."""
        rank = hashlib.sha256(f"{SEED} {key}".encode("utf-8", "surrogatepass")).hexdigest()
        insort(self._groups[group], (rank, item), key=lambda entry: entry[0])
        self.num_offered += 1
        self._num_held += 1
        if self._num_held > 2 * self.most:
            self._trim()

    def chosen(self) -> list[Item]:
        """The items that were kept, group by group."""
        self._trim()
        return [item for group in self._groups.values() for _, item in group]

    def _trim(self) -> None:
        # What leaves the largest group now would have left it at the end too: groups only grow.
        while self._num_held > self.most:
            max(self._groups.values(), key=len).pop()
            self._num_held -= 1


class Filter(NamedTuple):
    """A choice above the gallery: value, words and number of cards of each option."""

    name: str
    label: str
    options: tuple[tuple[str, str, int], ...]


class Gallery(NamedTuple):
    """Cards with their facts, the filters that leave a choice, and the number of all samples."""

    entries: Sequence[tuple[object, Mapping[str, str]]]
    filters: Sequence[Filter]
    num_all: int


def make_gallery(entries: Sequence[tuple[object, Mapping[str, str]]], num_all: int) -> Gallery:
    """Derive the filters of cards from the facts of each; an empty fact is none."""
    filters = []
    for name, (label, known) in _FILTERS.items():
        counts = Counter(facts[name] for _, facts in entries if facts.get(name))
        values = [*(v for v in known if v in counts), *sorted(v for v in counts if v not in known)]
        options = tuple((value, known.get(value, value), counts[value]) for value in values)
        if len(options) > 1:
            filters.append(Filter(name, label, options))
    return Gallery(entries, filters, num_all)


# --- HTML -------------------------------------------------------------------------------------


def _write_page(
    template: str, path: Path, pictures: PictureTable, content: Mapping[str, Any]
) -> Path:
    """Fill in a template and write the page, wholly or not at all.

    The page forbids itself all connections, and all scripts and styles but its own, which are
    named by their hashes: text that slipped through the escaping still could not run.
    """
    folder = resources.files("vpt.evaluation.report") / "templates"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "gallery.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    known = {"page_size": PAGE_SIZE, "verdict_words": VERDICT_WORDS, "pictures": pictures.uris}
    # Style and script are files of this package, not content.
    own = {"policy": policy, "style": Markup(style), "script": Markup(script)}
    page = _environment().get_template(template).render(**own, **known, **content)
    try:
        write_atomic(page, path)
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror or exc}") from exc
    return path


@cache
def _environment() -> Environment:
    environment = html_environment("vpt.evaluation.report")
    environment.filters.update(
        number=_number,
        signed=_signed,
        more=lambda value: f"{value:+,.0f}".replace("-", _MINUS),
        share=lambda value: _NOTHING if value is None else f"{100 * value:.1f}%",
        count=lambda value: _NOTHING if value is None else f"{value:,.0f}",
        p_value=lambda value: "<0.001" if value < 0.001 else f"{value:.3f}",
        cut=_cut,
        public=public_text,
    )
    return environment


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _signed(value: float | None) -> str:
    if value is None:
        return _NOTHING
    sign = _MINUS if value < 0 else "+" if value > 0 else ""
    return sign + _number(abs(value))


def _cut(text: str) -> str:
    """At most `MOST_CHARACTERS`, saying how many more there are."""
    rest = len(text) - MOST_CHARACTERS
    return text if rest <= 0 else f"{text[:MOST_CHARACTERS]} … ({rest:,} more characters)"


def _hash(text: str) -> str:
    """As a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
