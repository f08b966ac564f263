"""Features are encoded once, kept within a bound, and never taken for another image's."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from bases import EACH_BACKBONE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model

import vpt.inference.features as features_module
from vpt.branches import Features
from vpt.images import load_image
from vpt.inference.features import Encoders, FeatureCache, FeatureKey
from vpt.protocol.tokens import TOWER
from vpt.runtime import Runtime

BRANCHES = ("reencode", "dino", "sam")


@pytest.fixture(scope="module", params=EACH_BACKBONE)
def tiny(request):
    return tiny_model(backbone=request.param)


@pytest.fixture
def encoders(tiny):
    return Encoders(*tiny)


@pytest.fixture
def work(tiny):
    """Images that each encoder was really given."""
    model, _ = tiny
    counts = Counter()

    def count_images(name):
        def hook(module, args, kwargs, output):
            grid = kwargs.get("grid_thw")
            counts[name] += len(args[0]) if grid is None else len(grid)

        return hook

    towers = {"reencode": model.model.visual}
    towers |= {name: branch.encoder for name, branch in model.branches.items()}
    handles = [
        tower.register_forward_hook(count_images(name), with_kwargs=True)
        for name, tower in towers.items()
    ]
    yield counts
    for handle in handles:
        handle.remove()


def picture(seed, width=60, height=40):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return load_image(values)


def key(number, branch="dino"):
    return FeatureKey(branch, str(number), (1, 1), "RGB", "")


def features(num_bytes):
    return Features(torch.zeros(1, num_bytes // 4), (1, 1))


def assert_same(one, other, atol=0.0):
    assert one.grid_hw == other.grid_hw
    torch.testing.assert_close(one.values, other.values, atol=atol, rtol=0)


# --- the cache ------------------------------------------------------------------------------


@given(
    max_bytes=st.integers(0, 100),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40),
)
def test_the_cache_keeps_the_latest_used_within_its_bound(max_bytes, actions):
    cache, expected = FeatureCache(max_bytes), OrderedDict()
    for is_put, number in actions:
        size = 4 * (number + 3)  # the same key always brings the same features
        if is_put:
            cache.put(key(number), features(size))
            if number not in expected and size <= max_bytes:
                expected[number] = size
                while sum(expected.values()) > max_bytes:
                    expected.popitem(last=False)
        else:
            found = cache.get(key(number))
            assert (found is not None) == (number in expected)
            if found is not None:
                expected.move_to_end(number)
                assert found.values.nbytes == size
        assert cache.num_bytes == sum(expected.values()) <= max_bytes
        assert len(cache) == len(expected)


def test_what_was_asked_for_outlives_what_was_not():
    cache = FeatureCache(100)
    cache.put(key(1), features(40))
    cache.put(key(2), features(40))
    assert cache.get(key(1)) is not None
    cache.put(key(3), features(40))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None
    assert cache.get(key(3)) is not None


def test_what_is_too_large_does_not_drive_out_the_rest():
    cache = FeatureCache(100)
    cache.put(key(1), features(40))
    cache.put(key(2), features(104))
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = FeatureCache(0)
    cache.put(key(1), features(4))
    assert len(cache) == cache.num_bytes == 0


def test_the_same_features_put_twice_count_once():
    cache = FeatureCache(100)
    for _ in range(2):
        cache.put(key(1), features(40))
    assert (len(cache), cache.num_bytes) == (1, 40)


# --- no work twice --------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
def test_an_image_seen_before_costs_no_encoder_work(encoders, work, branch):
    ((first, was_there),) = encoders.encode([(branch, picture(1))])
    assert (was_there, work[branch]) == (False, 1)
    ((again, was_there),) = encoders.encode([(branch, picture(1))])
    assert (was_there, work[branch]) == (True, 1)
    assert_same(first, again)
    assert (encoders.num_encoded, encoders.num_reused) == (1, 1)


def test_an_image_is_known_by_its_content_not_its_file(encoders, work, tmp_path):
    picture(1).pixels.save(tmp_path / "a.png")
    picture(1).pixels.save(tmp_path / "b.bmp")
    for name in ("a.png", "b.bmp"):
        encoders.encode([("dino", load_image(tmp_path / name))])
    encoders.encode([("dino", picture(1))])
    assert work["dino"] == 1


def test_equal_images_of_one_batch_are_encoded_once(encoders, work):
    looks = [("sam", picture(1)), ("sam", picture(2)), ("sam", picture(1))]
    found = encoders.encode(looks)
    assert work["sam"] == 2
    assert_same(found[0][0], found[2][0])
    assert [was_there for _, was_there in found] == [False] * 3
    assert (encoders.num_encoded, encoders.num_reused) == (2, 1)


def test_a_batch_has_no_more_pixels_than_a_cpu_likes(encoders, monkeypatch):
    monkeypatch.setattr(features_module, "_PIXELS_PER_BATCH", {"cpu": 60 * 40 * 2})
    batches = []
    tower = encoders._branches[TOWER]
    preprocess = tower.preprocess
    monkeypatch.setattr(
        tower, "preprocess", lambda images: batches.append(len(images)) or preprocess(images)
    )
    sizes = [(60, 40), (60, 40), (60, 40), (200, 100), (60, 40)]
    images = [(TOWER, picture(n, *size)) for n, size in enumerate(sizes)]
    together = encoders.encode(images)
    assert batches == [2, 1, 1, 1]  # the large one is alone
    encoders.cache = FeatureCache(0)
    for (one, _), image in zip(together, images, strict=True):
        assert_same(one, encoders.encode([image])[0][0], atol=1e-5)


def test_each_branch_encodes_for_itself(encoders, work):
    looks = [(branch, picture(1)) for branch in BRANCHES]
    found = encoders.encode(looks)
    assert work == dict.fromkeys(BRANCHES, 1)
    for (branch, image), (one, _) in zip(looks, found, strict=True):
        assert_same(one, encoders.encode([(branch, image)])[0][0])
    assert len({tuple(one.values.shape) for one, _ in found}) == 3  # widths or grids differ


def test_without_a_cache_every_look_is_work(tiny, work):
    encoders = Encoders(*tiny, FeatureCache(0))
    results = [encoders.encode([("dino", picture(1))])[0] for _ in range(2)]
    assert work["dino"] == 2
    assert not results[1][1]
    assert_same(results[0][0], results[1][0])


def test_nothing_to_encode_is_no_work(encoders, work):
    assert encoders.encode([]) == []
    assert not work


def test_an_entry_does_not_hold_on_to_its_batch(encoders):
    found = encoders.encode([("dino", picture(seed)) for seed in range(3)])
    for one, _ in found:
        assert one.values.untyped_storage().nbytes() == one.values.nbytes
    assert encoders.cache.num_bytes == sum(one.values.nbytes for one, _ in found)


@pytest.mark.parametrize("perception", ["clip", "dino"])
def test_reencoding_what_the_tower_has_just_seen_costs_nothing(tiny, work, perception):
    runtime = Runtime(*tiny)
    for _ in range(2):  # the second question finds the first look there, too
        answer = runtime.ask(
            picture(1).pixels, "What is it?", perception=perception, max_new_tokens=12
        )
        assert answer.num_calls >= 1
        assert work["reencode"] == 1
        assert work["dino"] == (perception == "dino")
    assert answer.trace.calls[0].reused


# --- no mix-up ------------------------------------------------------------------------------


@given(data=st.data())
def test_different_images_never_share_an_entry(tiny, data):
    encoders = Encoders(*tiny)
    num_pixels = data.draw(st.sampled_from([1, 4, 6, 12]))
    size = num_pixels * 3
    raws = [data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2)]
    raws += [bytes([raws[0][0] ^ 1]) + raws[0][1:]]  # one bit differs
    images = {}
    for raw in raws:
        for width in (w for w in range(1, num_pixels + 1) if num_pixels % w == 0):
            image = load_image(np.frombuffer(raw, np.uint8).reshape(-1, width, 3).copy())
            again = load_image(image.pixels.copy())
            assert encoders.key("dino", image) == encoders.key("dino", again)
            images.setdefault(encoders.key("dino", image), set()).add((raw, image.size_wh))
    assert all(len(contents) == 1 for contents in images.values())


def test_equal_bytes_of_another_shape_are_another_image(encoders, work):
    raw = np.arange(36, dtype=np.uint8) * 7
    wide, tall = load_image(raw.reshape(2, 6, 3)), load_image(raw.reshape(4, 3, 3))
    assert wide.pixels.tobytes() == tall.pixels.tobytes()
    for branch in BRANCHES:
        (one, _), (other, _) = encoders.encode([(branch, wide), (branch, tall)])
        assert work[branch] == 2
        assert one.values.shape != other.values.shape or not torch.equal(one.values, other.values)


def test_a_crop_is_another_image_than_its_whole(encoders, work):
    whole = picture(1)
    crop = load_image(whole.pixels.crop((0, 0, 59, 40)))
    encoders.encode([("dino", whole), ("dino", crop)])
    assert work["dino"] == 2


def test_keys_differ_by_branch(encoders):
    keys = {encoders.key(branch, picture(1)) for branch in BRANCHES}
    assert len(keys) == 3


def test_keys_differ_by_the_settings_of_the_preprocessing(tiny):
    model, processor = tiny
    image = picture(1)
    other_model, other_processor = tiny_model(max_tokens=16)
    dino = other_model.branches["dino"]
    dino.preprocess_config = {**dino.preprocess_config, "resample": 2}
    mine, others = Encoders(model, processor), Encoders(other_model, other_processor)
    assert mine.key("reencode", image) != others.key("reencode", image)
    assert mine.key("dino", image) != others.key("dino", image)
    assert mine.key("sam", image) == others.key("sam", image)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_batch_gives_what_one_by_one_gives(tiny, branch):
    images = [picture(1), picture(2, 90, 31), picture(3, 30, 150), picture(4, 200, 200)]
    together = Encoders(*tiny).encode([(branch, image) for image in images])
    for image, (batched, _) in zip(images, together, strict=True):
        ((alone, _),) = Encoders(*tiny).encode([(branch, image)])
        assert_same(alone, batched, atol=1e-5)
    assert not torch.equal(together[0][0].values, together[1][0].values)


def test_features_come_back_in_the_order_asked_for(encoders):
    asked = [("sam", 2), ("reencode", 1), ("dino", 2), ("sam", 1)]
    looks = [(branch, picture(seed)) for branch, seed in asked]
    alone = [encoders.encode([look])[0][0] for look in looks]
    encoders.cache = FeatureCache()
    encoders.encode(looks[3:])  # one of them is there already
    together = encoders.encode(looks)
    for one, (other, _) in zip(alone, together, strict=True):
        assert_same(one, other, atol=1e-5)
    assert [was_there for _, was_there in together] == [False, False, False, True]


def test_features_carry_no_gradient(encoders):
    for branch in BRANCHES:
        ((one, _),) = encoders.encode([(branch, picture(1))])
        assert not one.values.requires_grad


def test_images_are_shrunk_as_the_configuration_says():
    model, processor = tiny_model()
    wide = load_image(Image.effect_noise((900, 600), 60).convert("RGB"))
    grids = {}
    for limit in (512, 256, None):
        model.config.image_resolution = limit
        encoders = Encoders(model, processor)
        (features, _), (dino, _) = encoders.encode([("reencode", wide), ("dino", wide)])
        grids[limit] = (features.grid_hw, encoders.key("dino", wide), dino.values)
    (at_512, key_512, dino_512), (at_256, key_256, dino_256), (free, _, _) = grids.values()
    assert [at_256, at_512] == [(6, 9), (12, 18)]  # 256x170 and 512x341 px, 28 px a token
    assert free[0] * free[1] <= 256 < free[0] * 28
    assert key_512 != key_256
    assert not torch.equal(dino_512, dino_256)
