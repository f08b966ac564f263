"""Conditions become options of a request, sample by sample."""

import pytest

from vpt.boxes import GridBox, contains, crop_box_px
from vpt.errors import PromptError
from vpt.evaluation.runner import CONDITIONS, TOOL_VALUE, find_conditions
from vpt.evaluation.samples import Sample
from vpt.protocol.tokens import PERCEPTION_MODES

WITH_BOX = Sample("1", (), "?", box=(100, 40, 120, 60))


def test_every_mode_of_the_runtime_is_a_condition():
    assert set(PERCEPTION_MODES) <= set(CONDITIONS)
    assert set(TOOL_VALUE) <= set(CONDITIONS)
    for mode in PERCEPTION_MODES:
        assert CONDITIONS[mode].request_options(WITH_BOX, (448, 448), 8) == {"perception": mode}


@pytest.mark.parametrize("name", ["blank", "random"])
def test_a_replaced_look_is_the_models_own_call(name):
    options = CONDITIONS[name].request_options(WITH_BOX, (448, 448), 8)
    assert options == {"perception": "auto", "replace_looks": name}


def test_the_true_region_shows_the_evidence():
    options = CONDITIONS["truth"].request_options(WITH_BOX, (448, 300), 8)
    assert isinstance(options["region"], GridBox)
    assert contains(crop_box_px(options["region"], (448, 300)), WITH_BOX.box)


@pytest.mark.parametrize("box", [None, (500, 400, 600, 500)])
def test_without_evidence_in_the_image_there_is_no_true_region(box):
    assert CONDITIONS["truth"].request_options(Sample("1", (), "?", box=box), (448, 300), 8) is None


def test_conditions_are_found_once_each_in_order():
    names = [condition.name for condition in find_conditions(["none", "auto", "none"])]
    assert names == ["none", "auto"]


@pytest.mark.parametrize(
    ("names", "words"), [([], "name at least one"), (["atuo"], "unknown perception 'atuo'; avail")]
)
def test_wrong_names_are_told(names, words):
    with pytest.raises(PromptError, match=words):
        find_conditions(names)
