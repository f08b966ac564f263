"""Answers that one can look into: looks, picture, notebook display, saved traces, folders."""

import re
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDENS
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox
from vpt.errors import ImageError, PromptError
from vpt.images import find_images, from_pixels

PHOTO = GOLDENS / "images" / "a_scene.png"


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def photo():
    with Image.open(PHOTO) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def cropped(runtime):
    region = GridBox(2, 1, 4, 3)
    return runtime.ask(PHOTO, "What?", region=region, max_calls=1, max_new_tokens=12)


@pytest.fixture(scope="module")
def encoded(runtime):
    return runtime.ask(PHOTO, "What?", perception="dino", max_calls=1, max_new_tokens=8)


def saved_and_loaded(answer, folder, **options):
    answer.trace.save(folder / "trace.json", **options)
    return vpt.Answer.from_trace(vpt.Trace.load(folder / "trace.json"))


def test_a_crop_has_the_pixels_of_its_box(cropped, photo):
    (look,) = cropped.looks
    assert (look.branch, look.region, look.image_index) == ("crop", GridBox(2, 1, 4, 3), 0)
    assert look.crop.tobytes() == photo.crop(look.box_xyxy_px).tobytes()
    assert look.image.tobytes() == photo.tobytes()
    assert look.scores is None and look.score_map is None
    assert look.num_tokens == np.prod(look.grid_hw) > 0 < look.ms


def test_a_re_encoding_has_a_score_map(encoded, photo):
    (look,) = encoded.looks
    assert (look.branch, look.region, look.crop) == ("dino", None, None)
    assert look.scores.shape == look.grid_hw and look.scores.ravel().tolist() == look.call.scores
    assert look.score_map.size == photo.size and look.score_map.mode == "RGB"
    assert look.box_xyxy_px == (19, 5, 93, 79)  # 224 of 256 pixels of the shorter side


def test_a_re_encoding_of_a_crop_lies_in_the_given_image(encoded, photo, tmp_path):
    trace = saved_and_loaded(encoded, tmp_path).trace
    box = (20, 10, 100, 70)
    crop = from_pixels(photo.crop(box), "crop")
    trace.calls[0].image = trace.add_image(crop, parent=0, box_xyxy_px=box)
    (look,) = vpt.Answer.from_trace(trace, [photo]).looks
    assert look.box_xyxy_px == (34, 14, 86, 66) and look.image_index == 1
    assert look.score_map.size == look.image.size == (80, 60)


def test_only_executed_calls_are_looks(runtime):
    answer = runtime.ask(PHOTO, "What?", perception="dino", max_calls=4, max_new_tokens=30)
    executed = [call for call in answer.trace.calls if call.outcome == "executed"]
    assert [look.call for look in answer.looks] == executed and answer.num_calls == len(executed)


def test_a_gray_look_is_shown_gray(runtime):
    options = {"region": GridBox(2, 1, 4, 3), "max_calls": 1, "max_new_tokens": 9}
    (look,) = runtime.ask(PHOTO, "What?", replace_looks="blank", **options).looks
    assert np.ptp(np.asarray(look.crop)) == 0


@pytest.mark.parametrize("which", ["cropped", "encoded"])
def test_a_loaded_trace_has_the_same_looks(which, request, tmp_path):
    answer = request.getfixturevalue(which)
    again = saved_and_loaded(answer, tmp_path)
    assert again == answer
    for one, other in zip(again.looks, answer.looks, strict=True):
        assert one.box_xyxy_px == other.box_xyxy_px
        for name in ("image", "crop", "score_map"):
            kept, exact = getattr(one, name), getattr(other, name)
            assert (kept is None) == (exact is None)
            if kept is not None:  # the trace keeps JPEG
                difference = np.abs(np.asarray(kept).astype(float) - np.asarray(exact))
                assert kept.size == exact.size and difference.mean() < 8
    assert again.picture().size == answer.picture().size


def test_images_can_be_left_out_of_a_saved_trace(encoded, photo, tmp_path):
    again = saved_and_loaded(encoded, tmp_path, images=False)
    assert [image.thumbnail for image in again.trace.images] == [None] * len(again.trace.images)
    (look,) = again.looks
    assert (look.scores == encoded.looks[0].scores).all()
    with pytest.raises(ImageError, match=r"holds no image of a_scene\.png; pass images="):
        _ = look.score_map
    assert "No picture: the trace holds no image" in again._repr_html_()
    given = vpt.Answer.from_trace(again.trace, [photo])
    assert given.looks[0].score_map.tobytes() == encoded.looks[0].score_map.tobytes()
    assert encoded.trace.images[0].thumbnail  # saving changes nothing


def test_a_streamed_trace_can_be_drawn_too(runtime):
    *_, stop = runtime.stream(PHOTO, "What?", region=GridBox(2, 1, 4, 3), max_new_tokens=12)
    answer = vpt.Answer.from_trace(stop.trace)
    assert answer.picture().width == 1200 and answer.looks[0].crop is not None


def test_a_notebook_shows_question_answer_calls_and_picture(runtime, encoded):
    html = encoded._repr_html_()
    assert "What?" in html and "<b>1</b> dino" in html and "cut off at the token limit" in html
    assert len(re.findall(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"', html)) == 1
    unsafe = runtime.ask(PHOTO, "<script>x</script>", max_new_tokens=2)._repr_html_()
    warned = vpt.Answer.from_trace(vpt.Trace("What?", "auto", warnings=["a <photo>"]))
    assert "<b>Warning:</b> a &lt;photo&gt;" in warned._repr_html_()
    assert "<script>" not in unsafe and "&lt;script&gt;x" in unsafe
    assert "<img" in runtime.ask([], "What?", max_new_tokens=2)._repr_html_()


def test_reprs_are_short(runtime, cropped, encoded):
    box = ",".join(map(str, cropped.looks[0].box_xyxy_px))
    assert re.fullmatch(
        rf"Answer\(text='.*', stop_reason='length', looks=\[crop {box}\]\)", repr(cropped)
    )
    assert f"Look(crop {box}, num_tokens=" in repr(cropped.looks)
    request = runtime.request(PHOTO, "What?", max_calls=2)
    assert repr(request).endswith("a_scene.png', 112x84)], 'What?', max_calls=2)")
    assert repr(runtime).startswith("Runtime('tiny', branches=[crop, ")
    for one in (encoded, encoded.trace, request, *encoded.trace.calls, *encoded.trace.images):
        assert len(repr(one)) < 400
    wordy = vpt.Answer.from_trace(vpt.Trace("why " * 999, "auto", answer="so " * 999))
    assert len(repr(wordy)) < 400 > len(repr(wordy.trace))


# Many images ------------------------------------------------------------------------------------


@pytest.fixture
def photos(photo, tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        photo.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "c.png").mkdir()
    return tmp_path


def names(paths):
    return [Path(path).name for path in paths]


def test_images_of_a_folder_or_pattern_come_in_the_order_of_names(photos):
    assert names(find_images(photos)) == ["a.JPG", "b.png", "broken.png"]
    assert names(find_images(f"{photos}/b*")) == ["b.png", "broken.png"]
    assert names(find_images(photos / "**" / "b.png")) == ["b.png"]
    for nothing in (photos / "c.png", photos / "none", photos / "*.gif"):
        with pytest.raises(ImageError, match=r"no images at '.*'; expected "):
            find_images(nothing)


def test_a_folder_is_asked_about_image_by_image(runtime, photos):
    requests = runtime.requests(photos, "What?", max_new_tokens=2)
    answers = runtime.ask_many(requests, on_error="return")
    assert names(a.trace.images[0].source for a in answers[:2]) == ["a.JPG", "b.png"]
    assert isinstance(answers[2], ImageError) and "broken.png" in str(answers[2])
    assert all(answer.picture() for answer in answers[:2])
    with pytest.raises(
        ImageError, match=r"request 2: .*broken.* \(1 of 3 requests failed"
    ) as caught:
        runtime.ask_many(requests)
    assert [type(one) for one in caught.value.answers] == [vpt.Answer, vpt.Answer, ImageError]


def test_one_question_is_asked_about_many_images(runtime, photos, photo, capsys):
    question = "<|im_end|>"  # is refused for each image alone
    errors = runtime.ask_many(str(photos), question=question, on_error="return", show_progress=True)
    assert [type(one) for one in errors] == [PromptError, PromptError, ImageError]
    assert "3/3" in capsys.readouterr().err
    errors = runtime.ask_many([photo, photo], question=question, on_error="return")
    assert [type(one) for one in errors] == [PromptError] * 2
    assert not capsys.readouterr().err
    with pytest.raises(
        PromptError, match="pass question=, to be asked about each image of 'photos'"
    ):
        runtime.ask_many("photos")
    with pytest.raises(PromptError, match="a glob pattern or a list of images, not int"):
        runtime.ask_many(3, question="What?")
