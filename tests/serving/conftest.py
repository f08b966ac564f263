"""A server of the shipped model, and one of a model that writes up to the limit."""

from importlib.util import find_spec

import pytest

import vpt

collect_ignore_glob = (
    [] if find_spec("fastapi") and find_spec("prometheus_client") and find_spec("openai") else ["*"]
)


@pytest.fixture(scope="session")
def embedded():
    return vpt.load()


@pytest.fixture(scope="session")
def endless():
    """A tiny random model, which writes up to the limit."""
    from tiny_model import tiny_model

    return vpt.Runtime(*tiny_model(), name="/models/tiny", max_num_seqs=2)


@pytest.fixture(scope="session")
def server(embedded):
    from served import serving

    with serving(embedded, num_traces=4) as served:
        yield served


@pytest.fixture(scope="session")
def url(server):
    return server[0]


@pytest.fixture(scope="session")
def client(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
