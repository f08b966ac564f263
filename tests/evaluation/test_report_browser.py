"""The report in a real browser: filters, pages, keys, and that nothing runs or leaves the page."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_report import EVIL, failed, make_record, make_results

from vpt.evaluation.compare import compare
from vpt.evaluation.report import write_comparison, write_report

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the chromium of the system"),
]


def make_records(photo):
    records = []
    for number in range(30):
        words = {"question": f"Question number {number}?", "group": f"g{number % 3}"}
        none = {"condition": "none", "score": number % 2, **words}
        auto = {"region": (1, 1, 3, 3)} if number % 3 else {}
        records.append(make_record(photo, f"s{number}", **none))
        records.append(make_record(photo, f"s{number}", number % 5 < 2, **auto, **words))
    records.append(make_record(photo, "evil", question=EVIL, prediction=EVIL, answers=(EVIL,)))
    records.append(failed("image", f"broken: {EVIL}", "gone"))
    return records


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.radial_gradient("L").save(path)
    return str(path)


@pytest.fixture(scope="module")
def report(photo, tmp_path_factory):
    records = make_records(photo)
    return write_report(make_results(records), records, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that is open, with everything it complained about or asked for."""

    def __init__(self, browser, file: Path, address="", **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri() + address)

    def cards(self):
        return self.page.locator("#gallery article")

    def status(self):
        return self.page.locator("#status").inner_text().replace("\N{EN DASH}", "-")

    def choose(self, name, value):
        self.page.locator(f"[data-filter={name}]").select_option(value)

    def next(self):
        return self.page.locator("[data-step='1']").first


@pytest.fixture
def visit(browser, report):
    visit = Visit(browser, report)
    yield visit
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
    visit.context.close()


def test_pages_of_24_are_loaded_one_at_a_time(visit):
    assert visit.cards().count() == 24 and visit.status() == "1-24 of 62"
    assert visit.page.locator("img[src]").count() == visit.page.locator("#gallery img").count()
    assert visit.page.locator("[data-step='-1']").first.is_disabled()
    visit.next().click()
    visit.next().click()
    assert visit.cards().count() == 14 and visit.status() == "49-62 of 62"
    assert visit.next().is_disabled()


def test_pictures_are_there(visit):
    loaded = "images => images.every(i => i.complete && i.naturalWidth > 0)"
    assert visit.page.locator("#gallery img").evaluate_all(loaded)
    frames = "all => all.every(f => f.querySelector('svg').clientWidth === f.clientWidth)"
    assert visit.page.locator(".frame:has(svg)").evaluate_all(frames)


@pytest.mark.parametrize(
    ("choices", "number"),
    [
        ({"condition": "none"}, 30),
        ({"condition": "auto", "verdict": "right"}, 13),
        ({"verdict": "error"}, 1),
        ({"called": "yes"}, 20),
        ({"change": "better"}, 6),
        ({"change": "worse"}, 9),
        ({"group": "g1", "condition": "none", "verdict": "wrong"}, 5),
    ],
)
def test_filters_leave_what_fits(visit, choices, number):
    for name, value in choices.items():
        visit.choose(name, value)
    assert visit.status().endswith(f"of {number}")
    assert visit.cards().count() == min(number, 24)
    visit.page.locator("button[type=reset]").click()
    visit.page.wait_for_function("document.getElementById('status').textContent.endsWith(' 62')")


def test_text_is_searched_in_questions_answers_and_ids(visit):
    search = visit.page.locator("#search")
    search.fill("NUMBER  17?")
    assert visit.cards().count() == 2
    search.fill("no such words")
    assert visit.cards().count() == 0
    assert visit.status() == "No sample fits these filters"
    assert visit.next().is_disabled()


def test_a_filter_goes_back_to_the_first_page(visit):
    visit.next().click()
    visit.choose("condition", "none")
    assert visit.status() == "1-24 of 30"


def test_an_id_finds_the_sample_under_every_condition(visit):
    visit.choose("condition", "none")
    visit.page.locator("[data-find=s12]").click()
    heads = visit.page.locator("#gallery h3").all_inner_texts()
    assert len(heads) == 2 and "none" in heads[0] and "auto" in heads[1]


def test_keys_search_and_turn_pages(visit):
    keyboard = visit.page.keyboard
    keyboard.press("ArrowRight")
    assert visit.status() == "25-48 of 62"
    keyboard.press("ArrowLeft")
    keyboard.press("ArrowLeft")
    assert visit.status() == "1-24 of 62"
    keyboard.press("/")
    keyboard.type("evil")
    keyboard.press("ArrowRight")
    assert visit.status() == "1-1 of 1"


def test_every_control_is_reached_by_tab(visit):
    visit.page.locator("[data-filter]").first.focus()
    reached = []
    for _ in range(10):
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate("document.activeElement.tagName"))
    assert reached.count("SELECT") == 4 and {"INPUT", "BUTTON"} <= set(reached)


def test_the_choice_survives_in_the_address(visit, browser, report):
    visit.choose("verdict", "right")
    visit.next().click()
    address = visit.page.evaluate("location.hash")
    again = Visit(browser, report, address)
    assert again.status() == visit.status() == "25-28 of 28"
    strange = Visit(browser, report, "#verdict=nonsense&page=x&text=")
    assert strange.status() == "1-24 of 62"
    assert again.complaints == strange.complaints == []
    again.context.close()
    strange.context.close()


def test_scripts_in_questions_and_answers_are_inert(visit):
    visit.page.locator("#search").fill("window.hacked")
    assert visit.cards().count() == 2
    assert visit.page.locator(".question").first.inner_text() == EVIL
    assert visit.page.evaluate("typeof window.hacked") == "undefined"
    assert visit.page.locator("#gallery script, #gallery [onerror]").count() == 0


def test_the_policy_stops_what_would_slip_through(browser, report):
    visit, blocked = Visit(browser, report), []
    visit.page.on("requestfailed", lambda request: blocked.append(request.failure))
    visit.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            new Image().src = "https://example.org/spy.png";
        }"""
    )
    assert visit.page.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in words for words in visit.complaints)
    assert blocked == ["csp"]
    visit.context.close()


@pytest.mark.parametrize("width", [320, 390, 800, 1600])
def test_no_screen_is_too_narrow(browser, report, width):
    visit = Visit(browser, report, viewport={"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.context.close()


def test_dark_screens_get_a_dark_page(browser, report):
    colours = []
    for scheme in ("light", "dark"):
        visit = Visit(browser, report, color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        colours += [visit.page.evaluate(f"[{style}.backgroundColor, {style}.color]")]
        visit.context.close()
    (light, ink), (dark, chalk) = [[_brightness(c) for c in pair] for pair in colours]
    assert light - ink > 400 and chalk - dark > 400


def _brightness(colour):
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", ")))


def test_a_comparison_has_the_same_gallery(browser, photo, tmp_path):
    first = [make_record(photo, f"s{n}", n % 2, prediction=EVIL) for n in range(40)]
    second = [make_record(photo, f"s{n}", n % 3 == 0, region=(0, 0, 2, 2)) for n in range(40)]
    found = compare(make_results(first), first, make_results(second), second)
    visit = Visit(browser, write_comparison(found, tmp_path / "compare.html"))
    assert visit.cards().count() == 20 and visit.status() == "1-20 of 20"
    visit.choose("fate", "broken")
    assert visit.cards().count() == 13
    assert visit.page.evaluate("typeof window.hacked") == "undefined"
    assert visit.complaints == []
    visit.context.close()
