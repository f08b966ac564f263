"""Each door gives the answer of the runtime, on each backbone."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import vpt
from vpt.model.encoding import RowEncoder
from vpt.model.generation import apply_rule_
from vpt.protocol.grammar import PerceptionGrammar, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS, invite
from vpt.trace.records import load_traces

pytestmark = pytest.mark.slow

QUESTION = "What is this?"
ASKED = {"perception": "dino", "max_calls": 1, "max_new_tokens": 14}


@pytest.fixture(scope="module")
def runtime(each_model):
    return vpt.load(each_model, device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.effect_noise((150, 90), 90).convert("RGB").save(file)
    return str(file)


@pytest.fixture(scope="module")
def answer(runtime, picture):
    answer = runtime.ask(picture, QUESTION, **ASKED)
    assert answer.num_calls == 1 and answer.text
    return answer


def options(model, **asked):
    """Words of the command line."""
    words = ["--model", model, "--device", "cpu"]
    return words + [word for n, v in asked.items() for word in (f"--{n.replace('_', '-')}", v)]


def test_the_command_line(run, each_model, picture, answer, tmp_path):
    words = options(each_model, **ASKED)
    trace, drawn = tmp_path / "trace.json", tmp_path / "look.png"
    code, _, _ = run("ask", picture, QUESTION, *words, "--trace", trace, "--picture", drawn)
    with Image.open(drawn) as image:
        assert code == 0 and image.width == 1200
    assert json.loads(trace.read_text())["answer"] == answer.text


def test_the_chat(run, each_model, runtime, picture, monkeypatch, tmp_path):
    lines = f"{QUESTION}\nAnd then?\n/save {tmp_path}/chat.json\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert run("chat", picture, *options(each_model, **ASKED))[0] == 0
    chat = runtime.chat(picture)
    expected = [chat.ask(question, **ASKED).text for question in (QUESTION, "And then?")]
    assert [trace.answer for trace in load_traces(tmp_path / "chat.json")] == expected


def test_the_evaluation(run, each_model, runtime, picture, tmp_path):
    sample = {"image": picture, "question": QUESTION, "answer": "x", "box": [8, 8, 40, 30]}
    (tmp_path / "own.jsonl").write_text(json.dumps(sample))
    words = options(each_model, splits=tmp_path / "own.jsonl", max_new_tokens=14)
    asked = ("--perception", "none,dino,truth", "--out", tmp_path / "out")
    assert run("eval", *words, *asked)[0] == 0
    files = (tmp_path / "out" / "records").glob("*.jsonl")
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = {record["condition"]: record["prediction"] for record in records}
    expected = runtime.ask(picture, QUESTION, perception="dino", max_new_tokens=14).text
    assert len(found) == 3 and found["dino"] == expected


def test_lmms_eval(each_model, runtime, picture, answer):
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from vpt.evaluation.lmms_eval_model import VPT

    model = VPT(
        model=str(each_model), device="cpu", perception="dino", max_calls=ASKED["max_calls"]
    )
    model.task_dict = {"own": {"test": [0]}}
    content = [{"type": "image", "url": Image.open(picture)}, {"type": "text", "text": QUESTION}]
    gen_kwargs = {"max_new_tokens": ASKED["max_new_tokens"], "do_sample": False, "until": []}
    asked = ("", lambda doc: [{"role": "user", "content": content}], gen_kwargs, 0, "own", "test")
    metadata = {"task": "own", "doc_id": 0, "repeats": 1}
    (result,) = model.generate_until([Instance("generate_until", asked, 0, metadata)])
    assert result.text == answer.text


def test_the_demo(runtime, picture, answer):
    from vpt.demo.runs import SETTINGS, draw_views, make_requests, watch_live
    from vpt.inference.request import OPTIONS

    settings = {name: OPTIONS[name].default for name in SETTINGS} | ASKED
    requests = make_requests(runtime, picture, QUESTION, settings)
    *_, last = watch_live(runtime.watch_many(requests))
    assert last.trace.answer == answer.text
    assert draw_views(last.trace).photo is not None


def test_the_server(runtime, picture, answer):
    pytest.importorskip("prometheus_client")
    client = pytest.importorskip("fastapi.testclient").TestClient
    from vpt.serving.app import create_app

    data = base64.b64encode(Path(picture).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [image, {"type": "text", "text": QUESTION}]
    asked = {
        "model": Path(runtime.name).name,
        "messages": [{"role": "user", "content": content}],
        **ASKED,
    }
    asked["max_tokens"] = asked.pop("max_new_tokens")
    with client(create_app(runtime), base_url="http://127.0.0.1") as door:
        done = door.post("/v1/chat/completions", json=asked)
    assert done.status_code == 200, done.text
    message = done.json()["choices"][0]["message"]
    assert message["content"] == answer.text
    assert [call["branch"] for call in message["perception"]["calls"]] == ["dino"]


def test_generate_of_transformers_after_a_call(runtime, picture, answer):
    model, row = runtime.model, BRANCH_TOKENS["dino"]
    contents = (f"<image>\n{invite(QUESTION, 'dino')}", row.call, row.placeholder, "")
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    asked = {"messages": messages, "images": [picture], "detection_images": [picture]}
    encoded = RowEncoder(model.config, runtime.processor).encode(asked, predict=True)
    written = [token.id for token in answer.trace.tokens if token.turn == 1]
    rule = PerceptionGrammar(runtime.vocabulary).rule(TurnState(), ())
    banned = apply_rule_(rule, torch.zeros(model.lm_head.out_features)).isinf()
    out = model.generate(
        torch.tensor([encoded.input_ids]),
        **encoded.pixels,
        max_new_tokens=len(written),
        do_sample=False,
        suppress_tokens=banned.nonzero().flatten().tolist(),
    )
    assert len(written) > 4
    assert out[0, len(encoded.input_ids) :].tolist() == written
