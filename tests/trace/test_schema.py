"""The published JSON schema of a trace: it is up to date, and real traces fit it."""

import json
from pathlib import Path

import pytest
from drawing import noise
from tiny_model import tiny_model

import vpt
from vpt.errors import PromptError
from vpt.trace.records import Trace

SCHEMA = Path(__file__).parents[2] / "docs" / "trace.schema.json"
COMMAND = "import json, vpt; print(json.dumps(vpt.Trace.json_schema(), indent=1))"


@pytest.fixture(scope="module", params=["region", "dino", "none"])
def saved(request):
    """A trace as its file holds it."""
    runtime, image = vpt.Runtime(*tiny_model()), vpt.load_image(noise(1))
    answer = runtime.ask([image], "What?", perception=request.param, max_new_tokens=8)
    answer.trace.keep_thumbnails([image])
    return json.loads(answer.trace.to_json())


def without_redundancy(schema):
    """What one version of pydantic writes and another leaves out, though it is implied."""
    if isinstance(schema, list):
        return [without_redundancy(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: without_redundancy(one) for name, one in schema.items()}
    implied = {"additionalProperties": True, "enum": [schema.get("const")]}
    return {name: one for name, one in kept.items() if implied.get(name) != one}


def test_the_published_schema_is_up_to_date():
    published = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema = without_redundancy(Trace.json_schema())
    command = f"python -c '{COMMAND}' > docs/trace.schema.json"
    assert schema == without_redundancy(published), command


def test_a_real_trace_has_the_fields_of_the_schema(saved):
    schema = Trace.json_schema()
    assert set(saved) == set(schema["properties"]) - {"warnings", "history", "proposals"}
    assert set(saved["tokens"][0]) == set(schema["$defs"]["TokenRecord"]["properties"])
    assert schema["properties"]["version"]["const"] == saved["version"] == 1
    assert Trace.from_dict(saved).to_dict()["tokens"] == saved["tokens"]


def test_warnings_are_kept_where_there_are_any(saved, tmp_path):
    trace = Trace.from_dict({**saved, "warnings": ["a.jpg is a photo"]})
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json").warnings == ["a.jpg is a photo"]
    assert Trace.from_dict(saved).warnings == []


@pytest.mark.parametrize(("stored", "mode"), [("region", "crop"), ("seg", "sam"), ("x", "x")])
def test_an_older_name_of_a_mode_is_read_as_todays(saved, stored, mode):
    assert Trace.from_dict({**saved, "perception": stored}).perception == mode


def test_a_real_trace_is_valid_under_the_schema(saved):
    validator = pytest.importorskip("jsonschema").Draft202012Validator(Trace.json_schema())
    validator.validate(saved)
    saved["calls"] = [{"branch": 3}]
    assert not validator.is_valid(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [{"id": 1, "text": "a", "turn": 0, "ms": 1, "x": 2}]}, "tokens.0. has an unk"),
        ({"images": [{"source": "a", "size_wh": [1, 2, 3], "digest": ""}]}, "size_wh cannot be .1"),
        ({"tokens": [{"id": True, "text": "a", "turn": 0, "ms": 1}]}, "id cannot be True: .*valid"),
        ({"counts": {"llm_tokens": 2**31}}, "llm_tokens cannot be 2147483648: .* less than 2147"),
        ({"question": 3}, "question cannot be 3: input should be a valid string"),
        ({"model": {"a": 2**64}}, "model cannot be .*: expected numbers below"),
    ],
)
def test_a_message_names_the_place_what_came_and_what_was_expected(change, words):
    content = {"version": 1, "question": "", "perception": "auto", **change}
    with pytest.raises(PromptError, match=f"not a trace: .*{words}"):
        Trace.from_dict(content)
