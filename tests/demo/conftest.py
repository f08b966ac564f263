"""The page, served by the embedded model and by one that never stops writing, once per file."""

import asyncio
import gc
import shutil
import warnings
from pathlib import Path

import pytest
from colors import ColorDetector
from tiny_model import tiny_model

import vpt

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="session")
def app_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradio's dependencies warn about each other
        pytest.importorskip("gradio")
        from vpt.demo import page
    return page


@pytest.fixture(scope="module", autouse=True)
def closed_after():
    """What gradio and its clients leave open is closed here, and not in somebody else's test.

    gradio asks for the event loop of the thread, which would make one that nobody closes.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def serve(app_module):
    """Serves the page of a model; returns its address."""
    served = []

    def start(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            page = app_module.build_app(model)
            served.append(page)
            _, url, _ = app_module.launch(
                page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True
            )
        return url

    yield start
    for page in served:
        page.close()
    served.clear()


@pytest.fixture(scope="session")
def embedded():
    return vpt.load(device="cpu", detector=ColorDetector())


@pytest.fixture(scope="module")
def url(serve, embedded):
    return serve(embedded)


@pytest.fixture(scope="session")
def endless():
    """Random weights: it writes up to the limit."""
    return vpt.Runtime(*tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def endless_url(serve, endless):
    return serve(endless)


@pytest.fixture(scope="session")
def picture():
    return ROOT / "examples" / "tags.jpg"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs the chromium of the system")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
