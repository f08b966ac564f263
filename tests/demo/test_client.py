"""The demo as a program uses it, through gradio's own client and plain HTTP."""

import json
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.view.wording import printable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gradio's dependencies warn about each other
    pytest.importorskip("gradio_client")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

pytestmark = pytest.mark.filterwarnings("ignore")
QUESTION = "What number is on the blue one?"
ANSWER, PLAIN, STREAM, PHOTO, CROP, HEAT, TRACE = range(7)


def connect(url):
    return Client(url, verbose=False, httpx_kwargs={"timeout": 90})


@pytest.fixture(scope="module")
def client(url):
    client = connect(url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def endless_client(endless_url):
    client = connect(endless_url)
    yield client
    client.close()


def settings(perception="auto", max_new_tokens=256, max_calls=4):
    return perception, max_calls, max_new_tokens, True, False, 1, 0, 1, 0, 0


def ask(client, picture, question=QUESTION, compare=False, look_for="", **changes):
    image = picture and handle_file(str(picture))
    given = image, question, compare, look_for
    return client.predict(*given, *settings(**changes), api_name="/ask")


def size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def plain(embedded, picture):
    """What the model says when it must not look again; not the right answer."""
    answer = embedded.ask(picture, QUESTION, perception="none").text
    assert answer != "3"
    return answer


def test_a_question_brings_what_the_page_shows(client, picture, plain):
    shown = ask(client, picture, compare=True)
    assert shown[ANSWER] == "3" and shown[PLAIN] == plain
    assert "region x 3, y 2" in shown[STREAM]
    assert size(shown[PHOTO]) == size(shown[CROP]) == (640, 640) and shown[HEAT] is None
    trace = vpt.Trace.load(shown[TRACE])
    assert trace.images[0].source == "tags.jpg" and trace.answer == "3"


def test_a_re_encoding_brings_photo_and_score_map(client, picture):
    shown = ask(client, picture, perception="dino")
    assert [size(path) for path in shown[HEAT]] == [(640, 640)] * 2 and shown[CROP] is None


def test_the_answer_is_that_of_every_other_door(client, embedded, goldens):
    path = goldens / "images" / "a_scene.png"
    shown = ask(client, path, "What is this?", perception="dino")
    direct = embedded.ask(path, "What is this?", perception="dino")
    assert shown[ANSWER] == printable(direct.text)


def test_a_follow_up_continues_the_chat_of_its_page_only(url, client, embedded, picture):
    other = connect(url)
    with pytest.raises(AppError, match="there is no answer to follow up here"):
        other.predict("And?", *settings(), api_name="/follow_up")
    other.close()
    questions, answers = [QUESTION], [ask(client, picture)[ANSWER]]
    for question in ("What number is on the yellow one?", "How many are there?"):
        shown = client.predict(question, *settings(), api_name="/follow_up")
        questions.append(question)
        assert all(f">{one}</li>" in str(shown) for one in (*questions, *answers))
        answers.append(shown[ANSWER])
        trace = vpt.Trace.load(shown[TRACE])
        assert trace.counts.reused_tokens > 60
        new = trace.counts.prompt_tokens - trace.counts.reused_tokens
        assert new > 5 and f"Read {new} new tokens, {trace.counts.reused_tokens} kept" in str(shown)
    chat = embedded.chat(picture)
    assert [printable(chat.ask(question).text) for question in questions] == answers
    with pytest.raises(AppError, match="the question is empty"):
        client.predict(" ", *settings(), api_name="/follow_up")
    again = client.predict(handle_file(shown[TRACE]), api_name="/replay")
    assert again[STREAM] == shown[STREAM] and f">{answers[0]}</li>" in str(again)
    with pytest.raises(AppError, match="there is no answer to follow up here"):
        client.predict("And?", *settings(), api_name="/follow_up")


def test_a_box_replaces_the_models_region(client, picture):
    given = handle_file(str(picture)), QUESTION, False, "", *settings(), 310, 290, 380, 325
    shown = client.predict(*given, api_name="/look_there")
    assert shown[ANSWER] == "4"


def test_a_phrase_says_where_to_look_first(client, picture):
    shown = ask(client, picture, look_for="the blue tag", max_calls=1)
    assert shown[ANSWER] == "3"
    trace = json.loads(Path(shown[TRACE]).read_text(encoding="utf-8"))
    assert trace["settings"]["look_for"] == "the blue tag" and trace["proposals"]
    with pytest.raises(AppError, match="look_for needs an image, a call"):
        ask(client, picture, look_for="the blue tag", perception="none")
    assert "proposals" not in json.loads(Path(ask(client, picture)[TRACE]).read_text())


def test_a_saved_trace_is_replayed(client, picture):
    first = ask(client, picture)
    again = client.predict(handle_file(first[TRACE]), api_name="/replay")
    assert again[ANSWER] == "3" and again[STREAM] == first[STREAM]
    assert open(again[CROP], "rb").read() == open(first[CROP], "rb").read()  # noqa: PTH123, SIM115


def test_a_question_without_a_picture_is_answered(client):
    shown = ask(client, None, "Hello?")
    assert shown[PHOTO] is None and shown[TRACE]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.png", b"no picture at all", "'notes.png' is not a supported image format"),
        ("cut.jpg", None, "'cut.jpg' cannot be decoded"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        ("empty.png", b"", "is empty"),
    ],
)
def test_a_bad_image_is_a_message(client, picture, tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(picture.read_bytes()[:9000] if content is None else content)
    with pytest.raises(AppError, match=said):
        ask(client, path)


def test_too_many_pixels_are_a_message(client, tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "vast.png")
    with pytest.raises(AppError, match=r"'vast.png' has too many pixels"):
        ask(client, tmp_path / "vast.png")


@pytest.mark.parametrize(
    ("question", "said"), [(" ", "the question is empty"), ("x" * 2001, "2001 characters")]
)
def test_a_bad_question_is_a_message(client, picture, question, said):
    with pytest.raises(AppError, match=said):
        ask(client, picture, question)


def test_a_run_that_fails_is_a_message_beside_the_other_answer(serve, picture):
    model, processor = tiny_model()
    torch.nn.init.constant_(model.projectors["dino"].linear_feature.weight, float("nan"))
    runtime = vpt.Runtime(model, processor)
    client = connect(serve(runtime))
    given = handle_file(str(picture)), QUESTION, True, "", *settings("dino", 6)
    job = client.submit(*given, api_name="/ask")
    with pytest.raises(AppError, match="the model's logits are not finite"):
        job.result()
    answer = runtime.ask(picture, QUESTION, perception="none", max_new_tokens=6).text
    assert job.outputs()[-1][PLAIN] == printable(answer)


def test_an_empty_slider_is_a_message(client, picture):
    with pytest.raises(AppError, match="max calls is empty; fill it in"):
        ask(client, picture, max_calls=None)


def test_words_of_files_are_no_html_in_a_message(client, picture, tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"version": "<img src=x onerror=hack()>"}')
    with pytest.raises(AppError, match="got '&lt;img src=x onerror=hack"):
        client.predict(handle_file(str(path)), api_name="/replay")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1, "images": 3}', '{"version": 2}'])
def test_a_broken_trace_is_a_message(client, tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(AppError, match=r"cannot read the trace t.json|not a trace|of version 1"):
        client.predict(handle_file(str(tmp_path / "t.json")), api_name="/replay")


def test_a_page_without_a_model_says_so_and_replays(serve, client, picture):
    from vpt.errors import CheckpointError

    file = ask(client, picture)[TRACE]
    lone = connect(serve(CheckpointError("no model in there; name another")))
    with pytest.raises(AppError, match="there is no model to ask: no model in there"):
        ask(lone, picture)
    assert lone.predict(handle_file(file), api_name="/replay")[ANSWER] == "3"
    lone.close()


# --- what must not be read, and what must end -----------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "app.py", "README.md"])
def test_no_file_of_the_machine_is_served(url, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}gradio_api/file={path}")
    assert caught.value.code in (403, 404)


def call(url, name, data):
    """One call by plain HTTP: how it ended, and with what."""
    body = json.dumps({"data": data}).encode()
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}gradio_api/call/{name}", body, head)
    event = json.load(urllib.request.urlopen(request))["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}") as answer:
        *_, kind, content = answer.read().decode().strip().splitlines()
    return kind.removeprefix("event: "), content


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/hostname"])
def test_no_file_of_the_machine_is_taken_for_an_upload(url, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    kind, content = call(url, "replay", [file])
    assert kind == "error" and "root" not in content
    kind, content = call(url, "ask", [file, QUESTION, False, "", *settings()])
    assert kind == "error" and "Traceback" not in content


def test_two_people_are_answered_at_once(url, picture, plain):
    def one(perception):
        client = connect(url)
        shown = ask(client, picture, perception=perception)
        client.close()
        return shown[ANSWER], "region" in shown[STREAM]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, ["auto", "none", "auto", "none"]))
    assert found == [("3", True), (plain, False)] * 2


def test_equal_pictures_of_two_answers_are_two_files(client, picture):
    # Gradio would write one file twice, the second time while it is downloaded.
    first, second = (Path(ask(client, picture)[PHOTO]) for _ in range(2))
    assert first.name != second.name and first.read_bytes() == second.read_bytes()


def reads(runtime, seconds=1.0):
    """Tokens that a model reads in some time."""
    before = runtime.engine.num_tokens_run
    time.sleep(seconds)
    return runtime.engine.num_tokens_run - before


def test_a_cancelled_question_stops_computing(endless_client, endless, picture):
    start, image = endless.engine.num_tokens_run, handle_file(str(picture))
    given = image, "Go on.", False, "", *settings("none", 2048)
    job = endless_client.submit(*given, api_name="/ask")
    while len(job.outputs()) < 3:
        time.sleep(0.05)
    assert "writes" in job.outputs()[-1][STREAM]
    job.cancel()
    deadline = time.monotonic() + 20
    while reads(endless) and time.monotonic() < deadline:
        pass
    assert reads(endless) == 0
    engine = endless.engine
    assert engine.num_free_slots >= 1 and engine.num_tokens_run < start + 2048
