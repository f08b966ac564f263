import pytest

from vpt import cli


@pytest.fixture
def scene(goldens):
    return str(goldens / "images" / "a_scene.png")


@pytest.fixture
def ask(capsys, monkeypatch, random_model):
    """Run ``vpt ask`` with a model that babbles; gives code, stdout and stderr."""
    monkeypatch.setattr("vpt.loading.EMBEDDED_MODEL", random_model)

    def run(*words, command="ask"):
        code = cli.main([command, *map(str, words)])
        return code, *capsys.readouterr()

    return run
