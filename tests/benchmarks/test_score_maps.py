"""The measurement of score maps: an ideal map, a mirrored one, and a run of the shipped model."""

import numpy as np
import pytest
import score_maps

import vpt

Z = np.array([[0.0, 3.0], [-1.0, -2.0]])
ASKED = np.array([[False, True], [False, False]])


def test_an_ideal_map_is_highest_on_the_object_asked_about():
    found = dict(score_maps.rows([score_maps.Map("dino", n, Z, ASKED, Z == -2) for n in (0, 0, 1)]))
    assert found["object asked about: share of places"] == "0.25"
    assert found["object asked about: highest score"].startswith("1.00 [")
    assert found["another object: lowest score"].startswith("1.00 [")
    assert found["object asked about: mean z"] == "+3.00"
    assert found["rank correlation, two questions"] == "1.00 (n = 1)"


def test_a_mirrored_map_is_found():
    right = score_maps.Map("dino", 0, Z, ASKED, np.zeros_like(ASKED))
    wrong = score_maps.Map("dino", 0, np.fliplr(Z), ASKED, np.zeros_like(ASKED))
    for one, drawn, mirrored in ((right, "1.00", "0.67"), (wrong, "0.67", "1.00")):
        found = dict(score_maps.rows([one]))
        assert found["AUC of objects, as drawn"] == drawn
        assert found["AUC of objects, mirrored"] == mirrored


@pytest.mark.slow
def test_maps_of_the_shipped_model_lie_on_their_scenes():
    pytest.importorskip("sklearn")
    maps = list(score_maps.maps_of(vpt.load(), 20, 4))
    assert maps
    for one in maps:
        assert one.z.mean() == pytest.approx(0, abs=1e-6)
        assert one.asked.any() or one.branch != "dino"  # a board is larger than a place
        assert not (one.asked & one.others).any()
