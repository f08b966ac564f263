"""The report: what is chosen, what is drawn, and that nothing in a record can harm the page."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpt.boxes import GridBox, crop_box_px
from vpt.errors import DataError, ImageError
from vpt.evaluation.intervals import mean_interval
from vpt.evaluation.records import Record
from vpt.evaluation.report import write_report
from vpt.evaluation.report.cards import (
    EVIDENCE_COLOUR,
    ROOM_WH,
    CardMaker,
    PictureTable,
    change_of,
    open_by_name,
    shown_size,
    verdict_of,
)
from vpt.evaluation.report.overview import (
    Axis,
    axis_around_zero,
    axis_from_zero,
    facts_of,
    overview_of,
)
from vpt.evaluation.report.page import EvenChoice, make_gallery
from vpt.evaluation.results import tool_value
from vpt.images import from_pixels, load_image
from vpt.trace.records import CallRecord, Counts, MalformedRecord, Timings, Trace
from vpt.view.renderers import Z_ENDS

EVIL = '</template></script><script>window.hacked = 1</script><img src=x onerror="hacked()">'


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "a photo.png"
    noise(400, 300).resize((40, 30)).resize((400, 300)).save(path)
    return str(path)


def make_trace(photo, *, region=None, branch=None, outcome="executed", settings=None):
    """A run on one photo, with a region call or a re-encoding call or none."""
    trace = Trace("What is this?", "auto", settings or {}, stop_reason="stop", turns=["a dog"])
    trace.add_image(load_image(photo))
    if region is not None:
        box = crop_box_px(GridBox(*region), trace.images[0].size_wh)
        call = CallRecord("crop", "", 0, 0, outcome, region)
        if outcome == "executed":
            call.box_xyxy_px = box
        trace.calls.append(call)
    if branch is not None:
        scores = [float(number) for number in range(12)]
        trace.calls.append(
            CallRecord(branch, "", 0, 0, outcome, grid_hw=(3, 4), scores=scores, num_tokens=12)
        )
    trace.counts = Counts(llm_tokens=150 + 100 * len(trace.calls))
    trace.timings = Timings(total=20.0 + 30 * len(trace.calls))
    return trace


def make_record(photo, id="one", score=1.0, *, split="docs", condition="auto", **fields):
    calls = {name: fields.pop(name) for name in ("region", "branch", "outcome") if name in fields}
    trace = make_trace(photo, settings=fields.pop("settings", None), **calls)
    fields = {"question": "What is this?", "prediction": "a dog", "answers": ("dog",), **fields}
    return Record(
        *(split, condition, id),
        **{"images": (photo,), "scores": {"acc": score}, "trace": trace.to_dict(), **fields},
    )


def failed(kind, message, id="bad", condition="auto", images=("gone.png",), split="docs"):
    error = {"kind": kind, "message": message}
    return Record(split, condition, id, "What is this?", images=images, error=error)


def make_results(records, **more):
    """What ``results.json`` would say of records scored by ``acc``."""
    entries = []
    for split, condition in dict.fromkeys((r.split, r.condition) for r in records):
        of_it = [r for r in records if (r.split, r.condition) == (split, condition)]
        values = [r.scores["acc"] for r in of_it if "acc" in r.scores]
        kinds = [r.error["kind"] for r in of_it if r.error]
        interval = mean_interval(values, num_resamples=50).to_dict() if values else None
        entries.append(
            {
                **{"split": split, "version": 1, "score": "acc", "condition": condition},
                **{"n": len(of_it), "not_asked": 0, "aggregate": {}, "groups": {}},
                "failures": {kind: kinds.count(kind) for kind in ("image", "row", "run")},
                "scores": {"acc": interval} if interval else {},
                "called": sum(r.num_calls > 0 for r in of_it) / len(of_it),
                "tokens": {"prompt": 1, "appended": 2, "generated": 3, "llm": 100 * len(of_it)},
                "milliseconds": 12.5,
            }
        )
    return {
        "version": 1,
        "model": {"name": "a-model", "hash": "abc123", "parameters": 2_000_000},
        "decoding": {"temperature": 0.0, "max_new_tokens": None, "constrain": True},
        **{"seed": 0, "git_commit": "f" * 40, "libraries": {"torch": "2.11.0"}},
        **{"device": "cpu", "seconds": 12.34, "tokens": {"prompt": 1234, "llm": 5678}},
        "splits": entries,
        "tool_value": [value.to_dict() for value in tool_value(records)],
        **more,
    }


class Page(HTMLParser):
    """A page taken apart: its tags in order, and its text, with or without that of cards."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        found = [attrs for name, attrs in self.tags if name == tag]
        return [a for a in found if all(a.get(k.strip("_")) == v for k, v in wanted.items())]


def write(records, folder, **options):
    path = write_report(make_results(records), records, folder, **options)
    return path.read_text(encoding="utf-8")


def pictures_of(html):
    return json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def card_of(record, baseline=None, source=open_by_name):
    pictures = PictureTable()
    return CardMaker(source, pictures).make(record, "acc", baseline), pictures


# What a sample counts as


@pytest.mark.parametrize(
    ("score", "verdict"), [(1, "right"), (0.5, "right"), (0.49, "wrong"), (0, "wrong")]
)
def test_graded_scores_are_right_from_one_half_on(photo, score, verdict):
    assert verdict_of(make_record(photo, score=score), "acc") == verdict


def test_without_a_score_nothing_is_right_or_wrong(photo):
    assert verdict_of(make_record(photo, scores={"iou": 1.0}), "acc") == "unscored"
    assert verdict_of(failed("run", "no room"), "acc") == "error"


@pytest.mark.parametrize(
    ("value", "baseline", "change"),
    [(1, 0, "better"), (0.2, 0.3, "worse"), (1, 1, "same"), (1, None, ""), (None, 1, "")],
)
def test_change_needs_both_scores(value, baseline, change):
    assert change_of(value, baseline) == change


# Which samples are shown


def test_small_groups_are_shown_whole_and_large_ones_evenly():
    choice = EvenChoice(30)
    for group, size in (("big", 5000), ("small", 4), ("middle", 100)):
        for number in range(size):
            choice.offer(group, f"{number}", (group, number))
    chosen = [group for group, _ in choice.chosen()]
    assert choice.num_offered == 5104
    assert [chosen.count(group) for group in ("big", "small", "middle")] == [13, 4, 13]


def test_the_same_samples_are_chosen_in_every_group():
    choice = EvenChoice(20)
    for number in range(300):
        for group in ("none", "auto"):
            choice.offer(group, f"sample {number}", (group, number))
    by_group = {g: {n for name, n in choice.chosen() if name == g} for g in ("none", "auto")}
    assert by_group["none"] == by_group["auto"]
    assert len(by_group["auto"]) == 10


def test_choosing_holds_few_items_and_the_order_they_come_in_does_not_matter():
    choice, backward = EvenChoice(10), EvenChoice(10)
    for number in range(1000):
        choice.offer(number % 2, str(number), number)
        backward.offer((999 - number) % 2, str(999 - number), 999 - number)
        assert choice._num_held <= 20
    assert sorted(choice.chosen()) == sorted(backward.chosen())


def test_fewer_items_than_asked_for_are_all_kept():
    choice = EvenChoice(10)
    for number in range(3):
        choice.offer("a", str(number), number)
    assert sorted(choice.chosen()) == [0, 1, 2]


# Pictures


@pytest.mark.parametrize("size_wh", [(1, 1), (4000, 3000), (2, 3000), (3000, 2), (40, 30)])
def test_every_picture_fits_the_room(size_wh):
    pictures = PictureTable()
    thumbnail = pictures.add(noise(*size_wh))
    assert (thumbnail.width, thumbnail.height) == shown_size(size_wh)
    assert 1 <= thumbnail.width <= ROOM_WH[0] and 1 <= thumbnail.height <= ROOM_WH[1]
    stored = decoded(pictures.uris[thumbnail.key])
    assert max(stored.size) <= 320


def test_tiny_pictures_are_kept_exactly_and_shown_grown():
    pictures, tiny = PictureTable(), noise(20, 15)
    thumbnail = pictures.add(tiny)
    assert thumbnail.is_grown and (thumbnail.width, thumbnail.height) == (160, 120)
    stored = decoded(pictures.uris[thumbnail.key])
    assert stored.format == "PNG" and stored.tobytes() == tiny.tobytes()


def test_equal_pictures_are_held_once():
    pictures = PictureTable()
    keys = [pictures.add(noise(100, 80, seed)).key for seed in (1, 1, 2)]
    assert keys == ["p0", "p0", "p1"]
    assert pictures.add(noise(100, 80, 3), "digest") is pictures.add(noise(9, 9), "digest")


# Cards


def test_a_region_is_outlined_and_its_crop_is_beside_the_photo(photo):
    record = make_record(photo, region=(2, 1, 4, 3), box=(100, 75, 300, 150))
    card, pictures = card_of(record)
    shown, crop = card.figures
    assert [outline.kind for outline in shown.outlines] == ["cells", "cut", "evidence"]
    cells, cut, evidence = shown.outlines
    assert cells.place == (25, 12.33, 37.5, 37.67)  # 3 of 8 cells each way, at whole pixels
    assert cut.place == (12.5, 0, 62.5, 62.33)  # a cell wider
    assert (evidence.place, evidence.colour) == ((25, 25, 50, 25), EVIDENCE_COLOUR)
    assert [label.words for label in shown.labels] == ["1"]
    assert (crop.kind, crop.number, crop.words) == ("crop", 1, "region x 2-4, y 1-3")
    aspect = crop.thumbnail.width / crop.thumbnail.height
    assert aspect == pytest.approx(250 / 187, rel=0.01)
    assert set(pictures.uris) == {shown.thumbnail.key, crop.thumbnail.key}


def test_a_region_that_was_not_cut_has_no_frame_and_no_crop(photo):
    record = make_record(photo, region=(2, 1, 4, 3), outcome="not_executed")
    card, _ = card_of(record)
    (shown,) = card.figures
    assert [outline.kind for outline in shown.outlines] == ["cells"]
    assert card.calls == ["region x 2-4, y 1-3 (not executed)"]
    assert card.called == "no"


def test_a_score_map_lies_over_the_photo(photo):
    card, pictures = card_of(make_record(photo, branch="reencode"))
    heat = card.figures[1]
    assert (heat.kind, heat.words, heat.ends) == ("heat", "clip", Z_ENDS)
    values = np.asarray(decoded(pictures.uris[heat.thumbnail.key]).convert("RGB")).astype(int)
    # Viridis: dark violet for the lowest in the upper left, yellow for the highest.
    assert values[:20, :20, 2].mean() > values[:20, :20, 1].mean()
    assert values[-20:, -20:, 1].mean() > values[-20:, -20:, 2].mean() + 30


def test_looks_that_were_replaced_say_so(photo):
    for kind, words in (("blank", "made blank"), ("random", "cut elsewhere")):
        record = make_record(photo, region=(0, 0, 1, 1), settings={"replace_looks": kind})
        card, pictures = card_of(record)
        assert words in card.figures[1].words
        extremes = decoded(pictures.uris[card.figures[1].thumbnail.key]).convert("L").getextrema()
        assert (extremes == (127, 127)) == (kind == "blank")


def test_labels_at_one_place_do_not_cover_each_other(photo):
    record = make_record(photo)
    trace = make_trace(photo)
    for region in ((0, 0, 1, 1), (0, 0, 2, 2), (0, 0, 3, 3)):
        box = crop_box_px(GridBox(*region), (400, 300))
        trace.calls.append(CallRecord("crop", "", 0, 0, "executed", region, box))
    card, _ = card_of(Record(**{**vars(record), "trace": trace.to_dict()}))
    places = [label.centre for label in card.figures[0].labels]
    for a, b in combinations(places, 2):  # 24 x 24 pixels of a photo that is 161 x 121
        assert abs(a[0] - b[0]) > 14 or abs(a[1] - b[1]) > 19


def test_a_photo_that_is_gone_is_said_on_the_card(photo, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photo).read_bytes())
    record = make_record(str(copy))
    copy.unlink()
    card, _ = card_of(record)
    assert card.figures == () and "does not exist" in card.problem
    assert card.verdict == "right"


def test_a_photo_that_changed_since_the_run_is_not_shown(photo, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photo).read_bytes())
    record = make_record(str(copy))
    noise(400, 300, 9).save(copy)
    card, _ = card_of(record)
    assert card.figures == () and "is not the picture the model saw" in card.problem


def test_thumbnails_of_the_trace_need_no_file(photo):
    trace = make_trace(photo)
    trace.keep_thumbnails([load_image(photo)])
    record = make_record(photo, images=("train.parquet#3",), trace=trace.to_dict())
    card, _ = card_of(record)
    assert len(card.figures) == 1 and not card.problem


def test_images_without_a_path_come_from_their_source(photo):
    pixels = load_image(photo).pixels
    trace = Trace("What?", "auto", stop_reason="stop")
    trace.add_image(from_pixels(pixels, "row 3"))
    record = make_record(photo, images=("row 3",), trace=trace.to_dict())
    asked = []

    def source(of):
        asked.append(of.id)
        return [from_pixels(pixels, "row 3")]

    maker = CardMaker(source, PictureTable())
    cards = [maker.make(record, "acc") for _ in range(3)]
    assert all(len(card.figures) == 1 for card in cards)
    assert asked == ["one"]


def test_a_source_that_failed_is_asked_again(photo):
    record = make_record(photo)
    maker = CardMaker(open_by_name, PictureTable())
    maker.photos(record)
    with pytest.raises(ImageError):
        maker.photos(make_record(photo, "two", images=("gone.png",)))
    with pytest.raises(ImageError):
        maker.photos(make_record(photo, "two", images=("gone.png",)))
    assert len(maker.photos(record)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": 99}, "expected a trace of version"), ({"calls": [{}]}, "not a trace")],
)
def test_a_trace_that_cannot_be_read_is_said_on_the_card(photo, change, words):
    record = make_record(photo)
    card, _ = card_of(Record(**{**vars(record), "trace": {**record.trace, **change}}))
    assert card.problem.startswith("The record cannot be drawn") and words in card.problem


def test_scores_that_do_not_fit_their_grid_leave_the_photo(photo):
    record = make_record(photo, branch="reencode")
    record.trace["calls"][0]["scores"] = [1.0]
    card, _ = card_of(record)
    assert [figure.kind for figure in card.figures] == ["photo"]
    assert "1 scores for a grid of (3, 4)" in card.problem


def test_a_run_that_failed_shows_its_photo_and_an_image_that_failed_none(photo):
    card, _ = card_of(failed("run", "no room", images=(photo,)))
    assert [figure.kind for figure in card.figures] == ["photo"]
    card, _ = card_of(failed("image", "'gone.png' does not exist"))
    assert card.figures == () and card.problem == ""
    assert (card.called, card.calls, card.stop_words) == ("", [], "")


def test_a_question_without_images_is_a_card_too(photo):
    trace = Trace("Hello?", "none", stop_reason="stop")
    card, _ = card_of(make_record(photo, images=(), trace=trace.to_dict()))
    assert card.figures == () and card.problem == ""


def test_the_score_that_decides_comes_first(photo):
    card, _ = card_of(make_record(photo, scores={"iou": 0.1, "acc": 1.0}), baseline=0.0)
    assert [name for name, _ in card.scores] == ["acc", "iou"]
    assert card.change == "better"


# Filters


def test_filters_offer_what_is_there_and_only_where_there_is_a_choice():
    facts = [
        {"split": "a", "called": "yes", "group": "x"},
        {"split": "a", "called": "no", "group": "y"},
        {"split": "a", "called": "", "group": "x"},
    ]
    called, group = make_gallery([(None, one) for one in facts], 10).filters
    assert (called.name, called.label) == ("called", "Looked again")
    assert called.options == (("yes", "called", 1), ("no", "did not call", 1))
    assert group.options == (("x", "x", 2), ("y", "y", 1))


# Charts


def test_places_along_an_axis():
    axis = Axis(-1, 1)
    assert [axis.at(value) for value in (-1, 0, 0.5, 7)] == [0, 50, 75, 100]
    assert axis.ticks() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([], 0, 1), ([0.2, 0.9], 0, 1), ([3, 17], 0, 20), ([-0.3, 0.5], -0.4, 1), ([1.0], 0, 1)],
)
def test_a_score_axis_holds_zero_and_all_values(values, low, high):
    axis = axis_from_zero(values)
    assert (axis.low, axis.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(
    ("values", "reach"), [([], 0.01), ([-0.13, 0.06], 0.2), ([0.5], 0.5), ([0.81, -1], 1)]
)
def test_a_difference_axis_is_even_on_both_sides(values, reach):
    axis = axis_around_zero(values)
    assert (axis.low, axis.high) == (pytest.approx(-reach), pytest.approx(reach))
    assert axis.at(0) == 50


# Numbers


def test_every_setting_of_a_run_is_told_even_unknown_ones(photo):
    results = make_results([make_record(photo)], judge={"model": "j-1", "n": 1200}, note=[1, 2])
    facts = dict(facts_of(results))
    assert facts["model hash"] == "abc123" and facts["parameters"] == "2,000,000"
    assert facts["decoding"] == "temperature 0, max new tokens not given, constrain yes"
    assert facts["git commit"] == "f" * 40 and facts["libraries"] == "torch 2.11.0"
    assert facts["judge"] == "model j-1, n 1,200" and facts["note"] == "1, 2"
    assert not {"splits", "tool value", "version"} & set(facts)


def test_a_condition_has_one_colour_in_all_splits(photo):
    records = [
        make_record(photo, split=split, condition=condition)
        for split, names in (("s", ("auto", "none", "sam")), ("t", ("sam", "none", "auto")))
        for condition in names
    ]
    rows = overview_of(make_results(records)).rows
    colours = [
        {r.entry["condition"]: r.colour for r in rows if r.entry["split"] == s} for s in "st"
    ]
    assert colours[0] == colours[1] == {"none": 0, "auto": 1, "sam": 2}
    assert [row.opens_split for row in rows] == [True, False, False] * 2


def test_results_in_the_bare_layout_are_shown_too(photo, tmp_path):
    records = [make_record(photo), failed("image", "gone")]
    results = make_results(records)
    for entry in results["splits"]:
        for name in ("not_asked", "groups", "aggregate", "version", "milliseconds"):
            del entry[name]
        del entry["tokens"]["llm"]
    del results["tool_value"]
    html = write_report(results, records, tmp_path).read_text(encoding="utf-8")
    assert "Does looking again help?" not in html
    (row,) = overview_of(results).rows
    assert (row.tokens_per_sample, row.tokens_per_solved) == (6, None)


# The page


@pytest.fixture(scope="module")
def page(photo, tmp_path_factory):
    records = [
        *(make_record(photo, f"s{n}", n % 2, condition="none") for n in range(6)),
        *(make_record(photo, f"s{n}", n % 3 / 2, region=(n, 0, n + 1, 2)) for n in range(6)),
        failed("image", "'gone.png' does not exist; check the path"),
        make_record(photo, "v0", split="views", condition="clip", branch="reencode"),
    ]
    return write(records, tmp_path_factory.mktemp("report"))


def test_the_page_needs_nothing_from_outside(page):
    parsed = Page(page)
    for _, attrs in parsed.tags:
        assert not {"srcset", "href", "action", "background", "style", "xlink:href"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert all("src" not in image for image in parsed.all("img"))
    assert [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object", "base")] == []
    assert not re.search(r"https?://|url\(|@import", page)
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy["content"]


def test_pictures_are_data_uris_and_shared(page):
    uris, images = pictures_of(page), Page(page).all("img")
    assert {image["data-picture"] for image in images} == set(uris)
    assert all(
        uri.startswith(("data:image/jpeg;base64,", "data:image/png;")) for uri in uris.values()
    )
    photos = [i for i in images if i["alt"].startswith("a photo.png")]
    assert len(photos) == 13 and len({i["data-picture"] for i in photos}) == 1


def test_numbers_come_with_n_failures_and_spread(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "auto acc 6 0.500 0." in text
    assert "1 image failure" in text and "7" in text
    assert "Does looking again help?" in text
    assert "1 unpaired" in text
    for words in ("abc123", "f" * 40, "torch 2.11.0", "12.34", "a-model"):
        assert words in text


def test_each_card_carries_what_it_is_filtered_by(page):
    cards = Page(page).all("template", class_="card")
    assert len(cards) == 14
    assert [c["data-verdict"] for c in cards].count("error") == 1
    auto = [c for c in cards if c["data-condition"] == "auto" and c["data-verdict"] != "error"]
    assert {c["data-called"] for c in auto} == {"yes"}
    assert {c["data-change"] for c in auto} == {"better", "worse", "same"}
    assert {c["data-change"] for c in cards if c["data-condition"] == "none"} == {""}


def test_failures_are_cards_with_their_message(page):
    text = Page(page).text
    assert "image failure:" in text and "'gone.png' does not exist; check the path" in text


def test_it_says_how_many_are_shown(photo, tmp_path):
    records = [make_record(photo, f"s{n}") for n in range(50)]
    text = Page(write(records, tmp_path, max_samples=30)).text
    assert "30 of 50 records shown, the same number of each" in text
    text = Page(write(records, tmp_path)).text
    assert "50 of 50 records shown." in text


def test_records_are_gone_through_once(photo, tmp_path):
    records = [make_record(photo, condition="none", score=0), make_record(photo)]
    path = write_report(make_results(records), iter(records), tmp_path)
    cards = Page(path.read_text(encoding="utf-8")).all("template", class_="card")
    assert [card["data-change"] for card in cards] == ["", "better"]


def test_nothing_in_a_record_becomes_markup(photo, tmp_path):
    record = make_record(photo, EVIL, branch="reencode", group=EVIL, split=EVIL, condition=EVIL)
    trace = record.trace
    trace["turns"], trace["stop_reason"] = [EVIL], EVIL
    trace["images"][0]["source"] = EVIL
    trace["calls"][0]["text"] = EVIL
    trace["malformed"] = [vars(MalformedRecord(EVIL, 0, EVIL))]
    record = Record(
        **{**vars(record), "question": EVIL, "prediction": EVIL, "answers": (EVIL,)},
    )
    record.scores[EVIL] = 1.0
    records = [record, failed("row", EVIL, EVIL), failed("run", EVIL, images=(EVIL,))]
    results = make_results(records)
    results["model"]["name"] = results["git_commit"] = results[EVIL] = EVIL
    for entry in results["splits"]:
        interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
        entry["aggregate"] = {EVIL: EVIL}
        entry["groups"] = entry["scores"] = {EVIL: interval, "acc": interval}
    html = write_report(results, records, tmp_path).read_text(encoding="utf-8")
    parsed = Page(html)
    assert len(parsed.all("script")) == 2
    assert not [image for image in parsed.all("img") if "onerror" in image or "src" in image]
    assert EVIL in parsed.text
    assert len(parsed.all("template")) == 3


def test_characters_that_turn_or_end_text_are_made_visible(photo, tmp_path):
    record = make_record(photo, question="a\u202eb\x1b[0m\ud800c", prediction="\x00")
    text = Page(write([record], tmp_path)).text
    assert "a\\u202eb\\x1b[0m\\ud800c" in text and "\\x00" in text


def test_long_answers_are_cut_and_say_so(photo, tmp_path):
    text = Page(write([make_record(photo, prediction="x" * 5000)], tmp_path)).text
    assert "x" * 2000 + " … (3,000 more characters)" in text
    assert "x" * 2001 not in text


@pytest.mark.parametrize("records", [[], [failed("row", "no question")]])
def test_a_run_without_answers_has_a_report(records, tmp_path):
    html = write(records, tmp_path)
    noun = "record" if len(records) == 1 else "records"
    assert f"{len(records)} of {len(records)} {noun} shown" in Page(html).text


def test_the_page_stays_small(photo, tmp_path):
    records = [
        make_record(photo, f"s{n}", condition=condition, region=(n % 6, 0, n % 6 + 1, 2))
        for n in range(20)
        for condition in ("auto", "blank", "random")
    ]
    html = write(records, tmp_path)
    assert len(pictures_of(html)) == 1 + 6
    assert len(html) < 500_000


def test_shares_of_a_chart_add_up(photo, tmp_path):
    none = [make_record(photo, f"s{n}", n < 5, condition="none") for n in range(10)]
    auto = [make_record(photo, f"s{n}", 3 <= n < 9) for n in range(10)]
    parsed = Page(write(none + auto, tmp_path))
    worse, better = (parsed.all("rect", class_=name)[0] for name in ("harm", "gain"))
    assert math.isclose(float(worse["width"].rstrip("%")), 15)  # 3 of 10, on half the width
    assert math.isclose(float(better["width"].rstrip("%")), 20)


def test_a_report_that_cannot_be_written_is_told(photo, tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*report\.html"):
        write([make_record(photo)], tmp_path / "nowhere")
