"""Laws of pipelines.datasets and pipelines.protocols: a digest names content and protocol, a loader gives just that."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffsr_core.degradation import Degradation
from pipelines import storage
from pipelines.datasets import Loader, open_dataset
from pipelines.images import Refused
from pipelines.protocols import PROTOCOLS, Framing, framed


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, shape in (("a.png", (43, 61, 3)), ("b.png", (40, 40)), ("c.png", (6, 50, 3))):
        (tmp_path / "hr").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(tmp_path / "hr" / name)
    return tmp_path / "hr"


def loaded(dataset, index):
    item = dataset.items[index]
    return Loader(**dataset.loader())({"key": item.key, "etag": item.etag, "place": item.place})


def test_hr_is_cropped_to_the_scale_and_lr_is_made_of_it_with_a_seed_of_its_content(folder):
    dataset = open_dataset(str(folder), scale=4, degradation="jpeg")
    found = loaded(dataset, 0)
    hr = np.asarray(Image.open(folder / "a.png"))[:40, :60]
    digest = storage.digest_bytes((folder / "a.png").read_bytes())
    assert np.array_equal(found.hr, hr) and found.lr.shape == (10, 15, 3) and found.digest == digest
    assert found.lr.tobytes() == loaded(dataset, 0).lr.tobytes()
    assert loaded(dataset, 1).lr.shape == (10, 10, 1)
    with pytest.raises(Refused) as refused:
        loaded(dataset, 2)
    assert refused.value.reason == "too_small" and "at least 19 px" in refused.value.message


def test_a_digest_changes_with_content_degradation_framing_and_limit_and_with_nothing_else(folder):
    def digest(**more):
        return open_dataset(str(folder), **{"scale": 4, **more}).digest

    first = digest()
    assert digest() == first == digest(split="val")  # a folder has no splits
    others = [
        digest(degradation="jpeg"),
        digest(limit=2),
        digest(framing=Framing(side=32)),
        digest(scale=2),
    ]
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
    others.append(digest())
    assert len({first, *others}) == 6


def test_twins_belong_to_the_digest_and_what_is_changed_after_the_listing_is_refused(folder, tmp_path):
    (tmp_path / "lr").mkdir()
    hr = np.asarray(Image.open(folder / "a.png"))[:40, :60]
    Image.fromarray(Degradation("bicubic", 4).apply(hr, seed=0)).save(tmp_path / "lr" / "ax4.png")
    twins = {"scale": 4, "lr_source": str(tmp_path / "lr"), "lr_name": "{stem}x4.png"}
    dataset = open_dataset(str(folder), **twins)
    found = loaded(dataset, 0)
    assert found.lr.shape == (10, 15, 3) and np.array_equal(found.hr, hr)
    assert dataset.digest != open_dataset(str(folder), scale=4).digest
    Image.fromarray(hr[:10, :15]).save(tmp_path / "lr" / "ax4.png")
    assert open_dataset(str(folder), **twins).digest != dataset.digest
    with pytest.raises(Refused) as refused:
        loaded(dataset, 0)
    assert refused.value.reason == "source_changed"


def test_settings_that_contradict_each_other_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="cannot be framed"):
        open_dataset(str(folder), scale=4, lr_source=str(folder), framing=Framing(side=32))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold images"):
        open_dataset(str(tmp_path / "empty"), scale=4)


def test_a_centre_square_is_averaged_over_whole_blocks():
    hr = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    found = framed(hr, Framing(side=35))
    blocks = hr[:, 15:85].astype(np.float64).reshape(35, 2, 35, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - blocks).max() <= 1  # Pillow rounds after each of its two passes
    assert np.array_equal(framed(hr, Framing(side=70)), hr[:, 15:85])
    cropped = framed(hr[:, :, :1], Framing(crop=40, side=40, filter="bilinear"))
    assert np.array_equal(cropped, hr[15:55, 30:70, :1])
    for small in (replace(Framing(side=71)), Framing(crop=71, side=40)):
        with pytest.raises(Refused):
            framed(hr, small)


def test_every_protocol_is_one_of_the_seeds_and_can_be_measured():
    assert set(PROTOCOLS) == {
        "sr3-faces-16-128",
        "sr3-64-256",
        "srdiff-celeba-x8",
        "srdiff-df2k-x4",
        "classic-x2-y",
        "classic-x3-y",
        "classic-x4-y",
    }
    for protocol in PROTOCOLS.values():
        assert protocol.framing is None or protocol.framing.side % protocol.scale == 0
        assert ("sigma" in protocol.metrics) == (protocol.samples > 1)
