"""What the data check passes, the loader and the converter of LLaMA-Factory take."""

import json
import random
import string
import warnings
from types import SimpleNamespace

import pytest
from fuzz.limits import within_limits

from vpt.data.check import RowChecker, check_rows
from vpt.data.loading import check_loading, has_loader, predict_loading
from vpt.data.rows import read_entries
from vpt.errors import VPTError

pytestmark = pytest.mark.skipif(not has_loader(), reason="LLaMA-Factory is not installed")

DINO = "<|detection_action_start|><|detection_action|><|detection_action_end|>"
REGION = "<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>"
ODD = [
    *(None, True, 0, -1, 3.0, 0.5, 2**40, 2**70, float("nan"), float("inf")),
    *(
        "",
        "a",
        "nan",
        "3",
        "\ud800",
        "\0",
        "<image>",
        "<|im_end|>",
        "http://x.de/a.png",
        "ä\n\u2028",
    ),
    *([], [None], ["a.png"], [1, "a"], [[]], {}, {"a": 1}, {"a": [1]}, {"b": "x"}),
]
KEYS = ["id", "note", "meta", "videos", "images", "clip_images", "detection_images", "messages"]


def make_row(rng, number):
    def turns(*texts):
        return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]

    kind = rng.randrange(4)
    if kind == 0:
        return {"messages": turns(f"What is {number}?", "A.")}
    if kind == 1:
        return {"messages": turns(f"<image>\nWhat is {number}?", "A."), "images": ["a.png"]}
    if kind == 2:
        asked = turns(f"<image>\n{number}?", REGION, "<image>", "A.")
        return {"messages": asked, "images": ["a.png", "b.png"], "clip_images": []}
    asked = turns(f"<image>\n{number}?", DINO, "<detection_image>", "A.")
    return {"messages": asked, "images": ["a.png"], "detection_images": ["a.png"]}


def mutate(rng, rows):
    """Change one thing in a row, or in a message of it."""
    row = rng.choice(rows)
    if not isinstance(row, dict):
        return
    place = row
    if rng.random() < 0.4 and row.get("messages") and isinstance(row["messages"], list):
        place = rng.choice(row["messages"])
    if not isinstance(place, dict):
        return
    kind = rng.randrange(6)
    if kind == 0 and place:
        del place[rng.choice(list(place))]
    elif kind == 1:
        place[rng.choice([*KEYS, *place])] = rng.choice(ODD)
    elif kind == 2:
        key = rng.choice(KEYS[:4])
        for number, one in enumerate(rows):
            if isinstance(one, dict):
                one[key] = rng.choice([number, str(number), 0.5 + number, None, {"n": number}])
    elif kind == 3:
        place["id"] = rng.choice([number for number in ODD if not isinstance(number, str)])
    elif kind == 4:
        rows[rng.randrange(len(rows))] = rng.choice([*ODD, dict(row)])
    else:
        place[rng.choice(string.ascii_letters)] = rng.choice(ODD)


def write(rng, rows):
    """Text of a file, with the faults that files have."""
    texts = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    if rng.random() < 0.1:
        number = rng.randrange(len(texts))
        texts[number] = texts[number].replace("{", '{"id": 1, ', 1)
    if rng.random() < 0.5:
        text = rng.choice(["[%s]", "[\n%s\n]\n", " [%s]"]) % rng.choice([",", ",\n"]).join(texts)
    else:
        text = "".join(one + rng.choice(["\n", "\n", "\r\n", "\n\n"]) for one in texts)
    if rng.random() < 0.1:
        text = "\ufeff" + text
    if rng.random() < 0.05:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", ",", "}", '"', text[:9]]) + text[at + 1 :]
    return text.encode("utf-8", "surrogatepass")


def convert(file, cache):
    """What LLaMA-Factory does with a file before it encodes rows; returns how many come out."""
    import datasets
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.parser import DatasetAttr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy, for casts in pandas
        loaded = datasets.load_dataset(
            "json", data_files=[str(file)], split="train", cache_dir=str(cache)
        )
    attributes = DatasetAttr("file", file.name, formatting="vpt")
    arguments = SimpleNamespace(
        template="vpt_qwen2_vl",
        streaming=False,
        media_dir=str(file.parent),
        dataset_dir=str(file.parent),
        preprocessing_num_workers=None,
        overwrite_cache=True,
    )
    return len(align_dataset(loaded, attributes, arguments, SimpleNamespace(local_process_index=0)))


def try_seed(seed, folder):
    """Check one file; whatever passes has to be loaded. Returns whether it passed."""
    rng = random.Random(seed)
    rows = [make_row(rng, number) for number in range(rng.randrange(1, 6))]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        mutate(rng, rows)
    content = write(rng, rows)
    file = folder / f"{seed}.{rng.choice(['json', 'jsonl'])}"
    file.write_bytes(content)
    with within_limits(f"seed {seed}"):
        try:
            read = read_entries(file)
            if not read:
                return False
            loading = check_loading(file, read)
            predicted = predict_loading(content, read)  # as where LLaMA-Factory is not installed
            without = check_rows(read, RowChecker({}), loading=list(predicted))
            assert without.findings or not loading, f"seed {seed}: only the loader: {loading}"
            report = check_rows(read, RowChecker({}), loading=loading)
        except VPTError:
            return False
    if report.findings:
        return False
    assert convert(file, folder / "cache") == len(read), f"seed {seed}"
    return True


@pytest.fixture
def quiet(factory):
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def factory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba and rouge, when they are compiled
        pytest.importorskip("llamafactory.train.tuner")
        import vpt

        vpt.register()


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 1030), marks=pytest.mark.slow)]
)
def test_what_the_check_passes_is_loaded(quiet, tmp_path, seeds):
    passed = [try_seed(seed, tmp_path) for seed in seeds]
    assert len(passed) / 10 < sum(passed) < len(passed)
