"""The demo, called through the real client over loopback."""

import gc
import importlib.util
import warnings
from pathlib import Path

import pytest
from PIL import Image

import vpt
from vpt.wording import printable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gradio's dependencies warn about each other
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def client():
    file = Path(__file__).parents[1] / "app.py"
    spec = importlib.util.spec_from_file_location("app", file)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
        app = module.build_app(vpt.load(device="cpu"))
        _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        talker = Client(url, verbose=False)
        yield talker
        talker.close()
        app.close()
        del talker, app, module
        gc.collect()  # what gradio leaves open is closed now, where nobody minds


def test_a_question_brings_the_answer_and_a_picture(client, goldens):
    image = handle_file(str(goldens / "images" / "a_scene.png"))
    answer, picture = client.predict(image, "What is this?", "dino", api_name="/ask")
    path = goldens / "images" / "a_scene.png"
    asked = vpt.load(device="cpu").ask(path, "What is this?", perception="dino")
    assert answer == printable(asked.text)
    with Image.open(picture) as drawn:
        assert drawn.width == 1200
        assert len(drawn.convert("RGB").getcolors(2**24)) > 1000


def test_a_question_without_an_image_is_answered(client):
    _, picture = client.predict(None, "Hello?", "auto", api_name="/ask")
    assert picture is not None


def test_an_empty_question_is_an_error_with_words(client):
    with pytest.raises(AppError, match="the question is empty"):
        client.predict(None, " ", "auto", api_name="/ask")
