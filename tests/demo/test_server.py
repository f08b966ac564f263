"""The demo of a model behind ``vpt serve``: the page, and messages without such a server."""

import warnings
from contextlib import closing

import pytest
from test_client import (
    ANSWER,
    CROP,
    HEAT,
    PHOTO,
    PLAIN,
    QUESTION,
    STREAM,
    TRACE,
    ask,
    connect,
    settings,
    size,
)
from test_media import Handler, listening
from tiny_model import tiny_model

import vpt
from vpt.cli import main
from vpt.errors import PromptError, ServiceError

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from served import serving, until

from vpt.demo.remote import RemoteModel
from vpt.demo.runs import SETTINGS, make_follow_up, make_requests
from vpt.inference.events import ErrorEvent, ResultEvent, StopEvent, TokenEvent

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gradio's dependencies warn about each other
    from gradio_client.exceptions import AppError

pytestmark = pytest.mark.filterwarnings("ignore")
DEFAULTS = dict(zip(SETTINGS, settings(), strict=True))


@pytest.fixture(scope="module")
def behind(embedded):
    with serving(embedded, num_traces=8) as (url, _):
        yield url


@pytest.fixture
def remote(behind):
    return RemoteModel(behind)


@pytest.fixture(scope="module")
def client(serve, behind):
    with closing(connect(serve(RemoteModel(behind)))) as client:
        yield client


@pytest.mark.slow
def test_the_page_shows_what_that_of_a_loaded_model_does(client, url, picture):
    with closing(connect(url)) as loaded:
        here, there = (ask(one, picture, compare=True) for one in (loaded, client))
    assert (there[ANSWER], there[PLAIN]) == (here[ANSWER], here[PLAIN]) and there[ANSWER] == "3"
    assert "region x 3, y 2" in there[STREAM] and size(there[CROP]) == size(here[CROP])
    mine, theirs = (vpt.Trace.load(one[TRACE]).to_dict() for one in (here, there))
    for name in ("question", "answer", "turns", "images", "settings", "stop_reason"):
        assert theirs[name] == mine[name], name


@pytest.mark.slow
def test_a_re_encoding_has_its_score_map(client, picture):
    shown = ask(client, picture, perception="dino")
    assert shown[HEAT] and shown[CROP] is None


@pytest.mark.slow
def test_a_box_goes_to_the_server(client, picture):
    from gradio_client import handle_file

    given = handle_file(str(picture)), QUESTION, False, "", *settings(), 310, 290, 380, 325
    assert client.predict(*given, api_name="/look_there")[ANSWER] == "4"


@pytest.mark.slow
def test_a_follow_up_continues_the_stream_on_the_server(client, embedded, picture):
    chat = embedded.chat(picture)
    chat.ask(QUESTION)
    ask(client, picture)
    for question in ("What number is on the yellow one?", "How many are there?"):
        shown = client.predict(question, *settings(), api_name="/follow_up")
        assert shown[ANSWER] == chat.ask(question).text
        trace = vpt.Trace.load(shown[TRACE])
        assert trace.history[0].text == QUESTION and trace.counts.reused_tokens > 60


def test_calls_and_text_come_as_they_happen(remote, picture):
    request, other = make_requests(remote, str(picture), QUESTION, DEFAULTS, compare=True)
    chat = remote.chat()
    seen = list(chat.watch(request, other))
    events = [one.event for one in seen if one.index == 0]
    kinds = [type(one) for one in events]
    assert kinds.index(ResultEvent) < kinds.index(TokenEvent) < kinds.index(StopEvent)
    assert events[0].call.box_xyxy_px == (112, 56, 280, 224)
    assert [one.text for one in chat.messages] == [QUESTION, "3"]
    make_follow_up(chat, "And?", DEFAULTS)


@pytest.mark.slow
def test_a_server_without_traces_is_asked_and_the_page_says_what_is_missing(
    serve, embedded, picture
):
    with serving(embedded) as (url, _), closing(connect(serve(RemoteModel(url)))) as client:
        shown = ask(client, picture)
        assert shown[ANSWER] == "3" and "hands out no trace" in str(shown)
        assert shown[PHOTO] and shown[CROP] is None
        assert client.predict("How many are there?", *settings(), api_name="/follow_up")[ANSWER]


def test_closing_a_run_frees_its_slot(picture):
    runtime = vpt.Runtime(*tiny_model(), name="tiny", max_num_seqs=1)
    with serving(runtime) as (url, _):
        remote = RemoteModel(url)
        (request,) = make_requests(remote, str(picture), "Go on.", {**DEFAULTS, "max_calls": 0})
        with closing(remote.chat().watch(request)) as snapshots:
            next(snapshots)
            assert runtime.worker.num_running == 1
        until(lambda: runtime.worker.num_running == 0, 3)


def test_what_the_server_refuses_is_a_message(remote):
    (only,) = remote.chat().watch(remote.request([], "the " * 50_000))
    assert isinstance(only.event, ErrorEvent)
    with pytest.raises(ServiceError, match=r"the answer of the server .* positions"):
        raise only.event.error


@pytest.mark.slow
def test_a_server_that_goes_down_is_a_message(serve, embedded, picture):
    with serving(embedded) as (url, _):
        page = serve(RemoteModel(url))
    with (
        closing(connect(page)) as client,
        pytest.raises(AppError, match=r"no answer from the server at .* check the address"),
    ):
        ask(client, picture)


def test_a_server_is_reached_or_refused_in_words(embedded, monkeypatch):
    with pytest.raises(PromptError, match="'localhost:8000' is not the URL of a server"):
        RemoteModel("localhost:8000")
    with pytest.raises(
        ServiceError, match=r"no answer from the server at http://127\.0\.0\.1:9/v1"
    ):
        RemoteModel("http://127.0.0.1:9")
    with listening(Handler) as other:
        host, port = other.server_address
        with pytest.raises(ServiceError, match="is not a server of this package"):
            RemoteModel(f"http://{host}:{port}")
    with serving(embedded, api_key="right") as (url, _):
        monkeypatch.setenv("VPT_API_KEY", "wrong")
        with pytest.raises(ServiceError, match="refuses the key; set VPT_API_KEY"):
            RemoteModel(url)
        monkeypatch.setenv("VPT_API_KEY", "right")
        assert RemoteModel(f"{url}/v1/").name == "embedded"


def test_the_command_takes_a_server_in_place_of_a_model(behind, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("vpt.demo.page.serve", lambda *args, **_: served.append(args))
    assert main(["demo", "--port", "0", "--server", behind]) == 0
    assert served[0][0].url == f"{behind}/v1"
    assert main(["demo", "--port", "0", "--server", behind, "--device", "cpu"]) == 2
    assert "--device is for a model that is loaded here" in capsys.readouterr().err
    assert main(["demo", "--port", "0", "--server", "http://127.0.0.1:9"]) not in (0, 1)
    assert "no answer from the server" in capsys.readouterr().err
