"""Each fault of a row is found under its own name, and sound rows are left alone."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model

from vpt.data.build import Annotation, build_row
from vpt.data.check import ModelLimits, RowChecker, check_rows
from vpt.data.checks import FINDINGS, ROW_KINDS, image_paths, known_tokens, view_row
from vpt.data.loading import ask_loader, check_loading, has_loader, predict_loading
from vpt.data.rows import ImageFacts, measure_images, read_entries, write_rows
from vpt.images import from_pixels
from vpt.model.config import load_config
from vpt.model.encoding import RowEncoder, open_row_image
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import split_crop_suffix

VARIANTS = ("clip", "dino", "sam")
IMAGES = {
    "a.png": ImageFacts((90, 150)),
    "b.png": ImageFacts((640, 480)),
    "gone.png": ImageFacts(None, "'gone.png' does not exist", is_missing=True),
    "torn.png": ImageFacts(None, "'torn.png' cannot be decoded"),
}
CORNER = "<|region_token_start|><|x_0|><|y_0|><|region_token_end|>"
REGION = "<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>"
CROP = "a.png_11,0,78,112"
DINO = "<|detection_action_start|><|detection_action|><|detection_action_end|>"


def row(*contents, system=None, **columns):
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **columns}


def region_row(call=REGION, crop=CROP, **columns):
    return row("<image>\nWhy?", call, "<image>", "So.", images=["a.png", crop], **columns)


def dino_row(call=DINO, shown="<detection_image>", paths=("a.png",)):
    columns = {"images": ["a.png"], "detection_images": list(paths)}
    return row("<image>\nWhy?", call, shown, "So.", **columns)


def found(row, images=IMAGES, **options):
    """Kinds of findings, and their details, of one row."""
    _, findings = RowChecker(images, **options).check(row)
    assert all(finding.kind in FINDINGS for finding in findings)
    return [tuple(finding) for finding in findings]


def kinds_found(row, **options):
    return [kind for kind, _ in found(row, **options)]


# Sound rows


def recorded(goldens, variant):
    content = json.loads((goldens / "goldens" / variant / "data_pipeline.json").read_text())
    return {sample["name"]: sample["row"] for sample in content["samples"]}


def measured(rows, root):
    paths = {split_crop_suffix(path)[0] for row in rows for path in image_paths(row)}
    return dict(measure_images(paths, root))


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_rows_are_sound_but_for_the_one_cut_short(goldens, variant):
    rows = recorded(goldens, variant)
    config = load_config(str(goldens / "checkpoints" / variant))
    processor = VPTProcessor.from_pretrained(goldens / "checkpoints" / variant)
    images = measured(rows.values(), goldens)
    checker = RowChecker(images, model=ModelLimits(config, processor, 1000))
    report = check_rows(rows.values(), checker)
    number = list(rows).index("action_only")
    assert {kind: [n for n, _ in entries] for kind, entries in report.findings.items()} == {
        "call-without-image": [number]
    }
    assert report.num_rows == len(rows) and report.num_with_findings == 1
    assert report.row_kinds == {
        variant: 5,
        f"{variant} alignment": 1,
        "direct": 3,
        "region": 1,
        "text only": 1,
    }


@settings(deadline=None)
@given(
    st.sampled_from(ROW_KINDS),
    st.tuples(st.integers(8, 500), st.integers(8, 500)),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.booleans(),
    st.sampled_from([3, 8]),
)
def test_whatever_is_built_is_sound(kind, size_wh, corners, invited, grid_size):
    (width, height), (x0, y0, x1, y1) = size_wh, corners
    x0, x1 = sorted((x0 * (width - 1), x1 * (width - 1)))
    y0, y1 = sorted((y0 * (height - 1), y1 * (height - 1)))
    box = (x0, y0, x1 + 1.5, y1 + 1.5)
    note = Annotation("a.jpg", "Why?", "So.", box, phrase="a tag")
    built = build_row(note, kind, size_wh, invited=invited, grid_size=grid_size)
    checker = RowChecker({"a.jpg": ImageFacts(size_wh)}, grid_size=grid_size)
    assert checker.check(built) == (kind, [])


@pytest.mark.parametrize(
    "sound",
    [
        row("Hi", "Hello"),
        row("<image><image>Which?", "The first.", images=["a.png", "b.png"]),
        row("<image>Why?", "So.", "<image>And this?", "Too.", images=["a.png", "b.png"]),
        row("<image>Why?", "So.", images=[CROP]),  # a crop may be the picture itself
        row("What is 1 < 2 | 3 > 2?", "<|", images=None),
        row("Why?", "So.", videos=[], depth_images=[]),
        # Looked at first, then the crop of the crop: 16,0 and so on in pixels of the whole.
        row(
            *("<image>\nWhy?", REGION, "<image>", CORNER, "<image>", "So."),
            images=["a.png", CROP, "a.png_11,0,27,28"],
        ),
        # Two regions in one turn are answered together.
        row(
            *("<image>\nWhy?", f"I look. {REGION}{REGION}"),
            *("Region 0: <image>\nRegion 1: <image>\n", "So."),
            images=["a.png", CROP, CROP],
        ),
        # A crop in a file of its own cannot be told from any other picture.
        region_row(crop="b.png"),
    ],
)  # fmt: skip
def test_other_sound_rows(sound):
    assert found(sound) == []


# Faults


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        ("text", "expected a JSON object, got str"),
        ({"messages": "hi"}, "expected messages to be a list, got 'hi'"),
        ({"messages": ["hi"]}, r"expected messages[0] to be an object, got 'hi'"),
        ({"messages": [{"role": "user"}]}, "expected messages[0] to have a text as content"),
        ({"messages": [{"content": "x"}]}, "expected messages[0] to have a text as role, got None"),
        (row("q", "\ud800"), "messages[1] is not valid text: it contains half of a surrogate pair"),
        (row("q", "a", images="a.png"), "expected images to be a list of paths, got 'a.png'"),
        (row("q", "a", seg_images=[1]), "expected seg_images to be a list of paths, got [1]"),
        (row("q", "a", images=["x" * 99, 1]), "..."),
    ],
)  # fmt: skip
def test_what_is_no_row_is_found(bad, detail):
    ((kind, words),) = found(bad)
    assert kind == "broken-row" and detail in words and len(words) < 200


@pytest.mark.parametrize("contents", [(), ("q",), ("q", "a", "q")])
def test_turns_out_of_order_are_found(contents):
    ((kind, words),) = found(row(*contents))
    assert kind == "turn-order" and "expected user and assistant by turns" in words


def test_files_of_a_row_out_of_order_are_looked_at_too():
    assert kinds_found(row("q", images=["gone.png"])) == ["turn-order", "missing-image"]


@pytest.mark.parametrize(
    ("bad", "finding"),
    [
        (row("q", " \n"), ("empty-turn", "messages[1] is empty")),
        (row("", "a", system="s"), ("empty-turn", "messages[1] is empty")),
        (row("q", "<|x_8|>"), ("unknown-token", "messages[1] contains <|x_8|>")),
        (row("q <|depth|>", "a"), ("unknown-token", "messages[0] contains <|depth|>")),
        (row("q", "a<|im_end|>"), ("misplaced-token", "messages[1] contains <|im_end|>")),
        (
            row("q", "<|seg_image_pad|>"),
            ("misplaced-token", "messages[1] contains <|seg_image_pad|>"),
        ),
        (
            row(f"q {REGION}", "a"),
            ("misplaced-token", "messages[0] contains <|region_token_start|>"),
        ),
        (
            row("q", "a", system="<|clip_action|>"),
            ("misplaced-token", "the system message contains <|clip_action|>"),
        ),
        (
            row("q", "<|x_1|>"),
            ("malformed-call", "messages[1]: <|x_1|>: perception tokens outside a call"),
        ),
        (
            row("q", "<|region_token_start|><|x_1|><|region_token_end|>"),
            (
                "malformed-call",
                "messages[1]: <|region_token_start|><|x_1|><|region_token_end|>: "
                "region has no y coordinate",
            ),
        ),
        (
            dino_row("<|detection_action_start|>"),
            (
                "malformed-call",
                f"messages[1]: <|detection_action_start|> is incomplete; expected {DINO}",
            ),
        ),
        (
            region_row(REGION + " So."),
            ("words-after-call", f"messages[1]: ' So.' follows {REGION}"),
        ),
        (
            row("<image>Why?", REGION, images=["a.png"]),
            (
                "call-without-image",
                "messages[1] calls for 1 <image>, the next turn has 0",
            ),
        ),
        (
            row("<image>Why?", DINO, "Hm?", "So.", images=["a.png"]),
            (
                "call-without-image",
                "messages[1] calls for 1 <detection_image>, the next turn has 0",
            ),
        ),
        (
            region_row("I look."),
            (
                "image-without-call",
                "messages[1] calls for 0 <image>, the next turn has 1 that are crops",
            ),
        ),
        (
            dino_row("I look."),
            (
                "image-without-call",
                "messages[1] calls for 0 <detection_image>, the next turn has 1",
            ),
        ),
        (
            dino_row(paths=()),
            ("placeholder-count", "1 <detection_image> in the text, 0 in detection_images"),
        ),
        (
            row("q", "a", images=["a.png"]),
            ("placeholder-count", "0 <image> in the text, 1 in images"),
        ),
        (
            row("q", "<image>"),
            ("placeholder-count", "messages[1] is an answer, but contains <image>"),
        ),
        (row("q", "a", depth_images=["a.png"]), ("unread-column", "depth_images")),
        (row("q", "a", videos=["a.mp4"]), ("unread-column", "videos")),
        (row("<image>q", "a", images=["gone.png"]), ("missing-image", "'gone.png' does not exist")),
        (
            row("<image>q", "a", images=["torn.png_0,0,5,5"]),
            ("unreadable-image", "'torn.png' cannot be decoded"),
        ),
        (
            region_row(crop="a.png_9,9,9,20"),
            ("crop-outside", "a.png_9,9,9,20 is empty; expected x0 < x1 and y0 < y1"),
        ),
        (
            region_row(crop="a.png_11,0,91,112"),
            ("crop-outside", "a.png_11,0,91,112 extends beyond 90x150 px"),
        ),
        (
            region_row(crop="a.png_-1,0,78,112"),
            ("crop-outside", "a.png_-1,0,78,112 extends beyond 90x150 px"),
        ),
        (
            region_row(crop="a.png_22,18,67,93"),  # the region itself, not widened
            (
                "crop-mismatch",
                "messages[1]: the region is 11,0,78,112 of 90x150 px, "
                "the image is a.png_22,18,67,93",
            ),
        ),
        (
            region_row(crop="a.png"),
            (
                "crop-mismatch",
                "messages[1]: the region is 11,0,78,112 of 90x150 px, the image is a.png",
            ),
        ),
        (
            region_row(crop="b.png_11,0,78,112"),
            (
                "crop-mismatch",
                "messages[1]: b.png_11,0,78,112 is cut out of an image that was not shown before",
            ),
        ),
    ],
)
def test_a_fault_is_found_and_nothing_else(bad, finding):
    assert finding in found(bad)
    assert {kind for kind, _ in found(bad)} <= {finding[0], *CONSEQUENCES.get(finding[0], ())}


CONSEQUENCES = {"misplaced-token": {"malformed-call"}, "placeholder-count": {"call-without-image"}}


def test_an_unknown_token_is_not_told_as_a_malformed_call_again():
    call = "<|region_token_start|><|x_2|><|y_1|><|x_8|><|y_4|><|region_token_end|>"
    assert found(region_row(call)) == [("unknown-token", "messages[1] contains <|x_8|>")]
    assert kinds_found(region_row(call), grid_size=9) == ["crop-mismatch"]


def test_the_whole_image_answers_a_region_of_the_whole():
    call = "<|region_token_start|><|x_0|><|y_0|><|x_7|><|y_7|><|region_token_end|>"
    assert found(region_row(call, crop="a.png")) == []


def test_without_sizes_nothing_is_said_of_crops_but_that_they_are_empty():
    assert found(region_row(crop="a.png_1,2,300,400"), images={}) == []
    assert kinds_found(region_row(crop="a.png_3,2,3,400"), images={}) == ["crop-outside"]


def test_equal_rows_are_found_whatever_else_they_hold():
    rows = [dino_row(), region_row(), {**dino_row(), "index": 7, "clip_images": []}, region_row()]
    report = check_rows(rows, RowChecker(IMAGES))
    assert report.findings == {
        "duplicate-row": [(2, "the same as row 0"), (3, "the same as row 1")]
    }
    assert check_rows(rows, RowChecker(IMAGES), ["duplicate-row"]).findings == {}


def test_findings_are_counted_by_kind_and_row():
    rows = [row("", " "), row("q", "a"), "text", "text"]
    report = check_rows(rows, RowChecker({}))
    assert [(kind, [n for n, _ in entries]) for kind, entries in report.findings.items()] == [
        ("broken-row", [2, 3]),
        ("empty-turn", [0, 0]),
    ]
    assert (report.num_rows, report.num_with_findings) == (4, 3)
    assert report.row_kinds == {"text only": 2, "broken": 2}


@pytest.mark.parametrize(
    ("sound", "kind"),
    [
        (row("<image>q", f"{REGION}{DINO}", images=["a.png"]), "dino+region"),
        (row("<seg_image><clip_image>q", "a", seg_images=["a"], clip_images=["a"]),
         "clip+sam alignment"),
    ],
)  # fmt: skip
def test_rows_of_several_kinds_are_named(sound, kind):
    assert RowChecker({}).check(sound)[0] == kind


# With a model


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_model()
    return model.config, processor


def test_a_branch_the_model_lacks_is_found(goldens):
    folder = goldens / "checkpoints" / "clip"
    config, processor = load_config(str(folder)), VPTProcessor.from_pretrained(folder)
    checker = RowChecker(IMAGES, model=ModelLimits(config, processor))
    expected = [("missing-branch", "the row uses dino; the model has: clip")]
    assert [tuple(f) for f in checker.check(dino_row())[1]] == expected
    alignment = row("<detection_image>\nq", "a", detection_images=["a.png"])
    assert [tuple(f) for f in checker.check(alignment)[1]] == expected
    assert checker.check(region_row())[1] == []


def test_other_tokens_of_a_tokenizer_are_known():
    said = row("q", "<|box_start|>")
    assert kinds_found(said) == ["unknown-token"]
    assert kinds_found(said, known=known_tokens(8, ["<|box_start|>", "<|im_end|>"])) == []
    assert kinds_found(row("q", "<|x_8|>"), known=known_tokens(9)) == ["malformed-call"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_are_those_of_the_encoded_rows(goldens, variant):
    folder = goldens / "checkpoints" / variant
    config, processor = load_config(str(folder)), VPTProcessor.from_pretrained(folder)
    encoder = RowEncoder(config, processor, lambda path: open_row_image(path, goldens))
    lengths = ModelLimits(config, processor)
    rows = recorded(goldens, variant).values()
    images = measured(rows, goldens)
    for one in rows:
        num_tokens = len(encoder.encode(one).input_ids)
        assert lengths.num_tokens(view_row(one, 8), images) == num_tokens
        for cutoff_len, details in ((num_tokens, []), (num_tokens - 1, [f"{num_tokens} tokens"])):
            checker = RowChecker(images, model=ModelLimits(config, processor, cutoff_len))
            findings = [finding for finding in checker.check(one)[1] if finding.kind == "too-long"]
            assert [finding.detail for finding in findings] == details


@pytest.mark.parametrize("size_wh", [(1, 1), (27, 300), (2000, 9), (513, 512), (1500, 900)])
def test_lengths_of_images_of_any_shape(tiny, size_wh):
    config, processor = tiny
    one = row("<image>q", "a", images=["x.png"])
    image = from_pixels(Image.new("RGB", size_wh), "x.png")
    encoder = RowEncoder(config, processor, lambda _: image)
    counted = ModelLimits(config, processor).num_tokens(
        view_row(one, 8), {"x.png": ImageFacts(size_wh)}
    )
    assert counted == len(encoder.encode(one).input_ids)


def test_a_length_that_cannot_be_told_is_none(goldens, tiny):
    folder = goldens / "checkpoints" / "clip"
    config, processor = load_config(str(folder)), VPTProcessor.from_pretrained(folder)
    lengths = ModelLimits(config, processor)
    for one in (
        row("<image>q", "a", images=["gone.png"]),
        row("<image>q", "a", images=["unknown.png"]),
        row("<image>q", "a", images=["a.png_5,5,5,9"]),
        row("q", "a", images=["a.png"]),
        dino_row(),
    ):
        assert lengths.num_tokens(view_row(one, 8), IMAGES) is None


# What the loader of LLaMA-Factory reads

LOADED = row("<image>\nWhy?", "So.", images=["a.png"])


def loading(file):
    """What is found in a file of rows, by the model of the loader, which the loader confirms."""
    rows = read_entries(file)
    predicted = list(predict_loading(file.read_bytes(), rows))
    if has_loader():
        assert bool(ask_loader(file, rows)) == bool(predicted)
    assert check_loading(file, rows) == predicted
    return [(number, finding.detail) for number, finding in predicted]


MIXED = {
    "id": ([7, "b"], "id is a text, in row 0 it is a number; write one type in all rows"),
    "flag": ([1, True], "flag is true or false, in row 0 it is a number"),
    "meta": ([{"a": 1}, [1]], "meta is a list, in row 0 it is an object"),
    "deep": ([{"a": [1]}, {"a": ["x"]}], "deep.a[] is a text, in row 0 it is a number"),
    "note": (["x", {"a": 1}], "note is an object, in row 0 it is a text"),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("column", MIXED)
def test_a_column_of_several_types_is_found(tmp_path, name, column):
    values, words = MIXED[column]
    write_rows([{**LOADED, column: value} for value in values], tmp_path / name)
    [(number, detail)] = loading(tmp_path / name)
    assert number == 1 and detail.startswith(words)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_what_the_loader_unites_is_left_alone(tmp_path, name):
    rows = [
        {**LOADED, "id": 1, "meta": {"a": 1}, "images": []},
        {**LOADED, "id": 2.5, "meta": {"b": "x"}, "late": "there"},
        {**LOADED, "id": None, "meta": None},
        {"messages": [{**LOADED["messages"][0], "name": "me"}, LOADED["messages"][1]]},
    ]
    write_rows(rows, tmp_path / name)
    assert loading(tmp_path / name) == []


def test_a_byte_order_mark_is_found_before_a_list_only(tmp_path):
    for name in ("rows.json", "rows.jsonl"):
        write_rows([LOADED] * 2, tmp_path / name)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    words = "the file begins with a byte order mark; save it as UTF-8 without one"
    assert loading(tmp_path / "rows.json") == [(None, words)]
    assert loading(tmp_path / "rows.jsonl") == []


def test_values_that_a_parser_cannot_read_are_found(tmp_path):
    write_rows([LOADED, {**LOADED, "id": 2**70}], tmp_path / "rows.json")
    [(number, detail)] = loading(tmp_path / "rows.json")
    assert number == 1 and detail.startswith("the row contains a number of more than 64 bits: 1180")
    text = json.dumps(LOADED) + "\n" + json.dumps({**LOADED, "id": "\ud800"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(text)
    assert loading(tmp_path / "rows.jsonl") == [(1, "the row contains half of a surrogate pair")]


@pytest.mark.parametrize("late", [{"images": ["a.png"]}, {"id": 1}, {"size": 0.5}])
def test_what_comes_after_the_first_part_of_json_lines_is_found(tmp_path, late):
    text = {**row("Why?" * 1000, "So."), "images": [], "size": 1}
    rows = [*[text] * 2700, {**text, **late}]
    write_rows(rows, tmp_path / "rows.jsonl")
    [(number, detail)] = loading(tmp_path / "rows.jsonl")
    assert number == 2700 and "which no row of the first 10 MB has; move such a row" in detail
    write_rows(rows, tmp_path / "rows.json")
    assert loading(tmp_path / "rows.json") == []


@pytest.mark.parametrize("text", ["null\n", '{"messages": []}\nnull\n', "[3]"])
def test_rows_that_are_no_objects_are_not_shown_to_the_loader(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)  # of the first one pyarrow dies
    rows = read_entries(tmp_path / "rows.jsonl")
    [(number, finding)] = check_loading(tmp_path / "rows.jsonl", rows)
    assert (number, finding.detail) == (len(rows) - 1, "the row is not a JSON object")


def test_a_file_of_another_name_is_not_loaded(tmp_path):
    write_rows([LOADED], tmp_path / "rows.txt")
    [(_, finding)] = check_loading(tmp_path / "rows.txt", [LOADED])
    assert finding.detail == "expected a name that ends in .json or .jsonl, got rows.txt"


@pytest.mark.skipif(not has_loader(), reason="LLaMA-Factory is not installed")
def test_texts_that_the_loader_takes_for_something_else_are_found(tmp_path):
    times = row("2020-01-01", "2020-01-02", images=None)  # read as points in time
    write_rows([times], tmp_path / "rows.jsonl")
    [(number, finding)] = check_loading(tmp_path / "rows.jsonl", [times])
    assert number is None
    assert finding.detail == "the loader takes the texts in messages[].content for timestamp[s]"


def test_findings_of_the_file_are_reported_beside_those_of_rows(tmp_path):
    write_rows([{**LOADED, "id": 1}, {**LOADED, "id": "b"}], tmp_path / "rows.json")
    file = tmp_path / "rows.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    rows = read_entries(file)
    loading = list(predict_loading(file.read_bytes(), rows))
    report = check_rows(rows, RowChecker(IMAGES), ["duplicate-row"], loading)
    assert [number for number, _ in report.findings["not-loadable"]] == [None, 1]
    assert report.num_with_findings == 1
