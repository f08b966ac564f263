"""The page in a real browser, as a person uses it."""

import base64
import io
import json
import re
import time

import pytest
from PIL import Image

import vpt

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
expect = sync_api.expect
expect.set_options(timeout=90_000)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUESTION = "What number is on the blue one?"


class Visit:
    """A page that is open, by someone of their own."""

    def __init__(self, browser, url, **options):
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(90_000)
        self.page = self.context.new_page()
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.button("Ask").wait_for()
        self.answer = self.page.locator("#answer textarea")
        self.plain = self.page.locator("#plain textarea")
        self.stream = self.page.locator("#stream")
        self.crop = self.page.locator("#crop img").first
        self.toast = self.page.locator(".toast-body, [data-testid=toast-body]").first

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def question(self):
        return self.page.get_by_label("Question", exact=True)

    def upload(self, path):
        self.page.locator("input[type=file]").first.set_input_files(str(path))
        self.page.locator("[data-testid=image] img, .image-frame img").first.wait_for()

    def replay(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.button("Replay a trace").click()
        chooser.value.set_files(str(path))

    def ask(self, question=QUESTION):
        self.question().fill(question)
        self.button("Ask").click()

    def ended(self):
        expect(self.stream.locator("li.end")).to_be_visible()

    def choose(self, mode):
        self.page.get_by_text("Settings", exact=True).first.click()
        self.page.get_by_role("radio", name=mode, exact=True).check()

    def size(self, image):
        return image.evaluate(
            "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
        )


@pytest.fixture
def visit(browser, url):
    visit = Visit(browser, url)
    yield visit
    assert visit.errors == []
    visit.context.close()


def test_an_upload_and_a_question_bring_answer_box_and_crop(visit, picture):
    visit.upload(picture)
    visit.ask()
    expect(visit.answer).to_have_value("3")
    visit.ended()
    expect(visit.stream.locator("li.call")).to_contain_text("region x 3, y 2")
    expect(visit.stream.locator("li.call")).to_contain_text(re.compile(r"16 tokens · \d+ ms"))
    expect(visit.crop).to_be_visible()
    assert visit.size(visit.crop) == [640, 640]
    expect(visit.page.locator("#photo img")).to_be_visible()


def test_a_picture_can_be_pasted(visit, picture, url):
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url.rstrip("/"))
    buffer = io.BytesIO()
    Image.open(picture).save(buffer, "PNG")
    visit.page.evaluate(
        """async base64 => {
            const bytes = await (await fetch("data:image/png;base64," + base64)).blob();
            await navigator.clipboard.write([new ClipboardItem({"image/png": bytes})]);
        }""",
        base64.b64encode(buffer.getvalue()).decode(),
    )
    visit.page.locator("button[aria-label='Paste from clipboard']").first.click()
    visit.page.locator("[data-testid=image] img, .image-frame img").first.wait_for()
    visit.ask()
    expect(visit.answer).to_have_value("3")


def test_a_follow_up_continues_until_another_image_is_chosen(visit, picture):
    further = visit.page.get_by_label("Follow-up question")
    expect(further).to_be_hidden()
    visit.upload(picture)
    visit.ask()
    visit.ended()
    further.fill("What number is on the black one?")
    visit.button("Ask further").click()
    expect(visit.page.locator("#earlier li")).to_have_count(3)
    visit.ended()
    expect(visit.page.locator("#looked")).to_contain_text(
        re.compile(r"Read \d+ new tokens, \d+ kept")
    )
    expect(further).to_have_value("")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.page.get_by_label("Remove Image").or_(visit.page.get_by_label("Clear")).first.click()
    expect(further).to_be_hidden()
    visit.page.get_by_text("Is there a green one?").click()
    expect(visit.answer).to_have_value("yes")
    expect(visit.page.locator("#earlier li")).to_have_count(0)
    expect(further).to_be_visible()


def test_a_click_on_an_example_is_enough(visit):
    visit.page.get_by_text("Is there a green one?").click()
    expect(visit.answer).to_have_value("yes")
    visit.ended()
    expect(visit.stream.locator("li.call")).to_have_count(0)
    expect(visit.crop).to_be_hidden()
    expect(visit.page.locator("#looked")).to_contain_text("The model did not look again")


def test_long_questions_and_answers_are_not_cut_off(visit):
    visit.page.get_by_text("Multiple points are circled").first.click()
    expect(visit.question()).to_have_value(re.compile("each point is on it"))
    visit.button("Ask").click()
    visit.ended()
    expect(visit.answer).to_have_value(re.compile("The answer is"))
    for field in (visit.question(), visit.answer):
        assert field.evaluate("one => one.scrollHeight <= one.clientHeight + 1")


def test_the_first_look_and_the_crop_have_the_sizes_that_the_model_saw(visit):
    visit.page.get_by_text(QUESTION).first.click()
    visit.ended()
    expect(visit.page.locator("#looked")).to_contain_text("chose to look again: region x 3, y 2")
    expect(visit.page.locator("#first-caption")).to_contain_text("112x112 px, 16 tokens")
    expect(visit.page.locator("#crop-caption")).to_contain_text("168x168 px of the photo, seen as")
    assert visit.size(visit.page.locator("#first img").first) == [640, 640]


def test_the_answer_streams_and_can_be_stopped(browser, endless_url):
    visit = Visit(browser, endless_url)
    visit.page.get_by_text("Settings", exact=True).first.click()
    visit.page.get_by_label("Tokens at most").first.fill("2048")
    visit.page.get_by_role("radio", name="none", exact=True).check()
    visit.ask("Go on.")
    tokens = visit.stream.locator(".facts", has_text="token")
    expect(tokens.last).to_be_visible()
    seen = {visit.stream.inner_text()}
    visit.page.wait_for_function(
        "before => document.querySelector('#stream').innerText != before", arg=seen.pop()
    )
    expect(visit.stream.locator("li.end")).to_have_count(0)
    visit.button("Stop").click()
    stopped = ""
    while stopped != (stopped := visit.stream.inner_text()):
        visit.page.wait_for_timeout(1000)
    assert int(re.findall(r"(\d+) tokens ·", stopped)[-1]) < 2048
    expect(visit.stream.locator("li.end")).to_have_count(0)
    visit.context.close()


def test_a_closed_page_stops_computing(browser, endless_url, endless):
    start = endless.engine.num_tokens_run
    visit = Visit(browser, endless_url)
    visit.page.get_by_text("Settings", exact=True).first.click()
    visit.page.get_by_label("Tokens at most").first.fill("2048")
    visit.ask("Go on.")
    expect(visit.stream.locator(".facts", has_text="token").last).to_be_visible()
    visit.context.close()
    read, engine = -1, endless.engine
    while read != (read := engine.num_tokens_run):
        time.sleep(2)
    assert engine.num_free_slots == engine.num_slots and read < start + 2048


def test_a_re_encoding_shows_photo_and_map_with_a_slider_between(visit, picture):
    visit.upload(picture)
    visit.choose("dino")
    visit.ask()
    visit.ended()
    expect(visit.stream.locator("li.call")).to_contain_text("DINOv2 on the whole image")
    expect(visit.page.locator("#heat-caption")).to_contain_text("z = -2.5")
    expect(visit.page.locator("#about-map")).to_contain_text("does not mark the object")
    images = visit.page.locator("#heat img")
    expect(images).to_have_count(2)
    assert visit.size(images.first) == visit.size(images.last) == [640, 640]
    before = [image.get_attribute("style") for image in images.all()]
    visit.page.locator("#heat").scroll_into_view_if_needed()
    box = visit.page.locator("#heat").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visit.page.mouse.move(*middle)
    visit.page.mouse.down()
    visit.page.mouse.move(middle[0] - 90, middle[1], steps=4)
    visit.page.mouse.up()
    visit.page.wait_for_function(
        "before => [...document.querySelectorAll('#heat img')]"
        ".some((image, index) => image.getAttribute('style') !== before[index])",
        arg=before,
    )


def test_the_answer_without_looking_again_stands_beside(visit, picture, embedded):
    visit.upload(picture)
    visit.page.get_by_label("Compare").check()
    visit.ask()
    visit.ended()
    expect(visit.answer).to_have_value("3")
    plain = embedded.ask(picture, QUESTION, perception="none").text
    assert plain != "3"
    expect(visit.plain).to_have_value(plain)


def test_two_clicks_on_the_photo_are_a_box_to_look_at(visit, picture):
    visit.upload(picture)
    visit.ask()
    visit.ended()
    visit.page.get_by_text("Look somewhere else").click()
    expect(visit.page.get_by_label("left", exact=True)).to_have_value("112")
    photo = visit.page.locator("#photo img")
    width = photo.bounding_box()["width"]
    for x, y in ((308, 288), (384, 324)):
        before = photo.get_attribute("src")
        photo.click(position={"x": x * width / 448, "y": y * width / 448})
        expect(photo).not_to_have_attribute("src", before)
    numbers = [
        visit.page.get_by_label(name, exact=True) for name in ("left", "top", "right", "bottom")
    ]
    expect(numbers[0]).not_to_have_value("112")
    marked = [int(number.input_value()) for number in numbers]
    wanted = (308, 288, 384, 324)
    assert all(abs(a - b) <= 3 for a, b in zip(marked, wanted, strict=True))
    visit.button("Answer from this box").click()
    expect(visit.answer).to_have_value("4")
    visit.ended()
    expect(visit.page.locator("#looked")).to_contain_text("it was given")
    expect(visit.stream).to_contain_text("not the model's choice")


def test_a_box_can_be_typed(visit, picture):
    visit.upload(picture)
    visit.ask()
    visit.ended()
    visit.page.get_by_text("Look somewhere else").click()
    for name, value in zip(("left", "top", "right", "bottom"), (308, 288, 384, 324), strict=True):
        visit.page.get_by_label(name, exact=True).fill(str(value))
    visit.button("Answer from this box").click()
    expect(visit.answer).to_have_value("4")


def test_a_trace_is_downloaded_and_replayed(visit, picture, tmp_path, browser, url):
    visit.upload(picture)
    visit.ask()
    visit.ended()
    with visit.page.expect_download() as got:
        visit.page.get_by_text("Download trace").click()
    got.value.save_as(tmp_path / "trace.json")
    assert vpt.Trace.load(tmp_path / "trace.json").answer == "3"
    later = Visit(browser, url)
    later.replay(tmp_path / "trace.json")
    expect(later.answer).to_have_value("3")
    expect(later.crop).to_be_visible()
    assert later.stream.inner_text() == visit.stream.inner_text()
    later.context.close()


def test_errors_are_words_on_the_page(visit, tmp_path):
    visit.ask(" ")
    expect(visit.toast).to_contain_text("the question is empty")
    visit.page.reload()
    visit.button("Ask").wait_for()
    (tmp_path / "notes.png").write_text("no picture")
    visit.page.locator("input[type=file]").first.set_input_files(str(tmp_path / "notes.png"))
    visit.page.wait_for_timeout(1500)
    visit.ask()
    expect(visit.toast).to_contain_text("'notes.png' is not a supported image format")
    visit.page.reload()
    visit.button("Ask").wait_for()
    (tmp_path / "t.json").write_text(json.dumps({"version": 7}))
    visit.replay(tmp_path / "t.json")
    expect(visit.toast).to_contain_text("expected a trace of version 1")
    assert "Traceback" not in visit.page.content()


def test_one_error_is_shown_at_a_time(visit):
    for _ in range(3):
        visit.ask(" ")
        expect(visit.toast).to_be_visible()
    visit.page.wait_for_timeout(1000)
    expect(visit.page.locator(".toast-body, [data-testid=toast-body]")).to_have_count(1)


def test_a_warning_stands_above_the_answer(visit, embedded, picture, tmp_path):
    image = vpt.load_image(picture)
    trace = embedded.ask(image, QUESTION).trace
    trace.keep_thumbnails([image])
    trace.warnings = ["a <b>warning</b> of somebody"]
    trace.save(tmp_path / "t.json")
    visit.replay(tmp_path / "t.json")
    notes = visit.page.locator("#notes [role=alert]")
    expect(notes).to_have_text("a <b>warning</b> of somebody")
    assert notes.bounding_box()["y"] < visit.answer.bounding_box()["y"]


def test_two_people_do_not_see_each_other(browser, url, picture):
    one, other = (Visit(browser, url) for _ in range(2))
    for visit in (one, other):
        visit.upload(picture)
    one.ask()
    other.ask("What number is on the black one?")
    expect(one.answer).to_have_value("3")
    expect(other.answer).to_have_value("4")
    for visit in (one, other):
        visit.ended()
        visit.context.close()


def test_the_keyboard_is_enough(visit):
    visit.page.keyboard.press("Tab")
    visit.question().focus()
    visit.page.keyboard.type("Hello?")
    visit.page.keyboard.press("Enter")
    visit.ended()
    visit.question().focus()
    reached = []
    for _ in range(4):
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate("document.activeElement.innerText || 'input'"))
    assert {"Ask", "Stop"} <= {words.strip() for words in reached}


def test_a_narrow_screen_needs_no_scrolling_sideways(browser, url):
    visit = Visit(browser, url, viewport={"width": 390, "height": 800})
    visit.page.get_by_text(QUESTION).first.click()
    visit.ended()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(visit.answer).to_be_in_viewport()
    answer = visit.answer.bounding_box()
    for other in (visit.page.locator("#photo"), visit.question(), visit.button("Ask")):
        assert answer["y"] + answer["height"] <= other.bounding_box()["y"]
    visit.context.close()


def test_a_laptop_shows_all_examples_and_the_question_without_scrolling(browser, url):
    visit = Visit(browser, url, viewport={"width": 1280, "height": 800})
    examples = visit.page.locator(".vpt-examples tbody tr")
    expect(examples).to_have_count(10)
    for example in [*examples.all(), visit.question(), visit.button("Ask")]:
        box = example.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1280
    visit.context.close()


@pytest.mark.parametrize("width", [700, 900, 1200])
def test_no_line_of_the_stream_is_squeezed(browser, url, picture, width):
    visit = Visit(browser, url, viewport={"width": width, "height": 900})
    visit.upload(picture)
    visit.ask()
    visit.ended()
    assert visit.stream.locator("li.end").bounding_box()["height"] < 90
    visit.context.close()


def test_dark_screens_get_a_dark_page(browser, url):
    found = []
    for scheme in ("light", "dark"):
        visit = Visit(browser, url, color_scheme=scheme)
        style = "getComputedStyle(document.querySelector('gradio-app'))"
        colours = visit.page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        found.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours])
        visit.context.close()
    (light, ink), (dark, chalk) = found
    assert light - ink > 400 and chalk - dark > 400
