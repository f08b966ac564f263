"""A model learns to call for phrases: from RefCOCO's format to an answer with a detector."""

import json

import pytest
from colors import ColorDetector
from factory import ROOT, losses, run_factory
from PIL import Image

import vpt
from vpt.boxes import contains
from vpt.loading import EMBEDDED_MODEL

yaml = pytest.importorskip("yaml")
pytest.importorskip("llamafactory")

COLORS = {"red": (200, 20, 20), "green": (20, 160, 20), "blue": (20, 20, 200)}


@pytest.fixture
def refcoco(tmp_path):
    """Pictures with three tags each, and a file with an expression for one of them."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tag"}]}
    content["refs"] = []
    for number, color in enumerate([*COLORS] * 2):
        picture = Image.new("RGB", (224, 224), "white")
        for place, one in enumerate(COLORS):
            x, y = 20 + 70 * ((place + number) % 3), 30 + 25 * number
            picture.paste(COLORS[one], (x, y, x + 40, y + 30))
            if one == color:
                thing = {"id": number, "image_id": number, "category_id": 1}
                content["annotations"].append({**thing, "bbox": [x, y, 40, 30]})
        picture.save(tmp_path / f"{number}.png")
        about = {"id": number, "width": 224, "height": 224, "file_name": f"{number}.png"}
        content["images"].append(about)
        ref = {"ann_id": number, "sentences": [{"sent": f"the {color} tag"}]}
        content["refs"].append(ref)
    (tmp_path / "refcoco.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_model_learns_to_call_for_what_it_is_asked_about(refcoco, run):
    model, saved = refcoco / "model", refcoco / "saved"
    made = ["--dtype", "float32", "--grounding", "--out", model]
    assert run("init", "--base", EMBEDDED_MODEL, *made)[0] == 0
    files = ["--out", refcoco / "phrases.json", "--dataset-info", refcoco / "dataset_info.json"]
    words = ["--images", refcoco, "--kinds", "grounding", "--free-choice"]
    assert not run("data", "build", refcoco / "refcoco.json", *words, *files)[0]
    checked = ["--images", refcoco, "--model", model, "--cutoff-len", "1024"]
    assert not run("data", "check", refcoco / "phrases.json", *checked)[0]
    settings = yaml.safe_load((ROOT / "configs" / "own-data.yaml").read_text(encoding="utf-8"))
    settings |= {"model_name_or_path": str(model), "output_dir": str(saved), "dataset": "phrases"}
    settings |= {"dataset_dir": str(refcoco), "media_dir": str(refcoco), "num_train_epochs": 60}
    evaluated = {"do_eval": True, "eval_dataset": "phrases", "compute_accuracy": True}
    run_factory("train", settings | evaluated | {"plot_loss": False}, refcoco / "run")
    assert losses(saved)[-1] < 0.1
    results = json.loads((saved / "eval_results.json").read_text(encoding="utf-8"))
    assert results["eval_num_grounding"] == 12  # a start and an end each
    assert results["eval_accuracy_grounding"] == 1

    runtime = vpt.load(str(saved), detector=ColorDetector())
    for number, color in enumerate(COLORS):
        answer = runtime.ask(refcoco / f"{number}.png", f"Where is the {color} tag?")
        call, found = answer.trace.calls[0], answer.trace.proposals[0]
        assert (call.branch, call.phrase) == ("grounding", f"the {color} tag")
        assert contains(call.box_xyxy_px, found.box_xyxy_px)
        assert answer.text.startswith("(") and not answer.warnings
