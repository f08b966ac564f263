import subprocess
import sys

import pytest
import torch
from PIL import Image

from vpt import branches
from vpt.branches import BranchError, Features, crop
from vpt.branches.encoder import check_images, complete_settings, read_settings


def test_public_names_are_sorted_and_can_be_imported():
    assert branches.__all__ == sorted(branches.__all__)
    for name in branches.__all__:
        assert getattr(branches, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SegBranch'"):
        _ = branches.SegBranch


def test_importing_the_package_brings_no_heavy_library():
    code = (
        "import sys, vpt.branches; "
        "heavy = {'torch', 'transformers', 'torchvision', 'segment_anything', 'groundingdino'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_encoders_need_no_optional_package():
    code = (
        "import sys; "
        "blocked = ('torchvision', 'segment_anything', 'groundingdino', 'cv2', 'timm'); "
        "sys.modules.update(dict.fromkeys(blocked)); "
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name in blocked else find(name, *rest); "
        "from vpt.branches import DinoBranch, GroundingBranch, ReencodeBranch, SamBranch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_features_must_fill_their_grid():
    assert Features(torch.zeros(6, 4), (2, 3)).grid_hw == (2, 3)
    with pytest.raises(BranchError, match=r"grid of 2x3 cells needs .*\[6, C\]; got \[5, 4\]"):
        Features(torch.zeros(5, 4), (2, 3))
    with pytest.raises(BranchError, match="got"):
        Features(torch.zeros(1, 6, 4), (2, 3))


def gradient_image():
    image = Image.new("RGB", (7, 5))
    image.putdata([(x, y, x * y) for y in range(5) for x in range(7)])
    return image


def test_crop_copies_the_pixels_of_the_box():
    image = gradient_image()
    piece = crop(image, (2, 1, 6, 4))
    assert piece.size == (4, 3)
    assert [piece.getpixel((x, y)) for y in range(3) for x in range(4)] == [
        (x, y, x * y) for y in range(1, 4) for x in range(2, 6)
    ]
    piece.paste((9, 9, 9), (0, 0, 4, 3))
    assert image.tobytes() == gradient_image().tobytes()


def test_crop_of_the_whole_image_and_of_one_pixel():
    assert crop(gradient_image(), (0, 0, 7, 5)).tobytes() == gradient_image().tobytes()
    assert crop(gradient_image(), (6, 4, 7, 5)).getpixel((0, 0)) == (6, 4, 24)


@pytest.mark.parametrize(
    "box", [(2, 2, 2, 4), (2, 2, 4, 2), (4, 2, 2, 4), (-1, 0, 3, 3), (0, 0, 8, 5), (0, 0, 7, 6)]
)
def test_crop_rejects_a_box_that_is_empty_or_outside(box):
    with pytest.raises(BranchError, match=rf"box \({box[0]}, .* from an image of 7x5 px"):
        crop(gradient_image(), box)


def test_settings_are_completed_without_sharing_state():
    defaults = {"size": {"shortest_edge": 256}, "resample": 3}
    settings = complete_settings({"resample": 2, "image_processor_type": "X"}, defaults)
    assert settings == {"size": {"shortest_edge": 256}, "resample": 2}
    settings["size"]["shortest_edge"] = 1
    assert defaults["size"]["shortest_edge"] == 256


def test_an_unknown_setting_is_named_with_the_available_ones():
    with pytest.raises(BranchError, match="unknown preprocess settings crop; available: crop_size"):
        complete_settings({"crop": 224}, {"crop_size": 224})


def test_settings_are_read_from_a_folder_if_it_has_them(tmp_path):
    assert read_settings(tmp_path, {"resample": 3}, {}) is None
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"resample": 2, "device": null, "processor_class": "P"}')
    assert read_settings(tmp_path, {"resample": 3}, {"dtype": "auto"}) == {"resample": 2}
    file.write_text('{"do_flip": true}')
    with pytest.raises(BranchError, match="not supported: do_flip"):
        read_settings(tmp_path, {"resample": 3}, {})


def test_images_must_be_rgb_and_at_least_one():
    with pytest.raises(BranchError, match="at least one image; got none"):
        check_images([])
    with pytest.raises(BranchError, match="expected RGB PIL images; got RGBA"):
        check_images([Image.new("RGB", (2, 2)), Image.new("RGBA", (2, 2))])
    with pytest.raises(BranchError, match="got str"):
        check_images(["a.png"])
