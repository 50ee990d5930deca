"""Laws of the counter-based noise."""

import math
import time

import numpy as np
import pytest
import torch

from diffsr_core.noise import _box_muller, gaussian, noise_key, philox4x32

KEY = (0x12345678, 0x9ABCDEF0)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def field(**changes: int) -> torch.Tensor:
    asked = {"channels": 8, "height": 64, "width": 64, "step": 3} | changes
    return gaussian(KEY, **asked)


# Source: Random123, tests/kat_vectors, "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    first, second = words(key)
    assert philox4x32(torch.tensor(words(counter)), (first, second)).tolist() == words(expected)


def test_philox_of_many_counters_is_philox_of_each() -> None:
    counters = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (2, 50, 4)))
    together = philox4x32(counters, KEY)
    one_by_one = torch.stack([philox4x32(c, KEY) for c in counters.reshape(-1, 4)]).reshape(2, 50, 4)
    assert torch.equal(together, one_by_one)
    assert together.min() >= 0 and together.max() < 2**32


def test_values_are_box_muller_of_the_philox_words_of_x_y_group_step() -> None:
    height, width, step = 9, 13, 5
    counter = torch.tensor(
        [[[[x, y, group, step] for x in range(7, 7 + width)] for y in range(2, 2 + height)] for group in range(2)]
    )
    w = philox4x32(counter, KEY).numpy().astype(np.float64)
    radius = np.sqrt(-2 * np.log((w[..., 0::2] + 1) / 2**32))
    angle = 2 * np.pi * w[..., 1::2] / 2**32
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(2, height, width, 4)
    expected = normals.transpose(0, 3, 1, 2).reshape(8, height, width)
    got = gaussian(KEY, channels=8, height=height, width=width, step=step, y0=2, x0=7)[0].numpy()
    assert np.abs(got - expected).max() < 4e-7  # one rounding to float32 of values below 6.7


def test_the_rarest_words_give_finite_values() -> None:
    rare = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    first, second = torch.cartesian_prod(rare, rare).T.contiguous()
    cosine, sine = _box_muller(first, second)
    u = (first.numpy() + 1.0) / 2**32
    assert torch.hypot(cosine, sine).numpy() == pytest.approx(np.sqrt(-2 * np.log(u)), rel=1e-14, abs=1e-300)
    assert cosine.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-14)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(0, 0, 1, 1), (5, 17, 33, 7), (211, 0, 40, 301), (1, 300, 299, 1)]
)
def test_window_of_the_field_is_cut_from_one_field(top: int, left: int, height: int, width: int) -> None:
    whole = gaussian(KEY, channels=6, height=300, width=301, step=2, y0=-40, x0=-9)
    window = gaussian(KEY, channels=6, height=height, width=width, step=2, y0=top - 40, x0=left - 9)
    assert torch.equal(window, whole[:, :, top : top + height, left : left + width])


def test_channels_asked_for_do_not_change_the_channels_given() -> None:
    assert torch.equal(field(channels=3), field(channels=8)[:, :3])


def test_coordinates_are_taken_modulo_two_to_the_32() -> None:
    assert torch.equal(field(y0=-7, x0=-1), field(y0=2**32 - 7, x0=2**32 - 1))
    across = field(y0=-32, x0=-32)
    assert torch.equal(across[..., 32:, 32:], field(height=32, width=32))


def test_threads_do_not_change_the_bits() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = field(height=257, width=263)
        torch.set_num_threads(2)
        assert torch.equal(field(height=257, width=263), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", ["step", "sample", "seed", "content", "rows", "columns"])
def test_another_coordinate_gives_an_uncorrelated_field(change: str) -> None:
    size = {"channels": 4, "height": 128, "width": 128}
    first = gaussian(noise_key(1, "asset", 0), **size, step=0)
    key = {"sample": noise_key(1, "asset", 1), "seed": noise_key(2, "asset", 0), "content": noise_key(1, "asseu", 0)}
    y0, x0 = 128 * (change == "rows"), 128 * (change == "columns")
    second = gaussian(key.get(change, noise_key(1, "asset", 0)), **size, step=int(change == "step"), y0=y0, x0=x0)
    correlation = float((first * second).mean())
    assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_channels_and_neighbours_are_uncorrelated() -> None:
    rows = field(channels=12).reshape(12, -1).double()
    correlation = torch.corrcoef(rows) - torch.eye(12, dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(rows.shape[1])
    x = field(channels=12)
    assert abs(float((x[..., 1:] * x[..., :-1]).mean())) < 4 / math.sqrt(x.numel())
    assert abs(float((x[..., 1:, :] * x[..., :-1, :]).mean())) < 4 / math.sqrt(x.numel())


def test_values_are_standard_normal() -> None:
    x = field(channels=48).double().flatten()
    n = x.numel()
    for power, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert abs(float(x.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n), power
    ordered = torch.sort(x).values
    normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    distance = (normal - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


def test_keys_differ_by_seed_digest_and_sample_and_stay() -> None:
    keys = {noise_key(s, d, n) for s in (0, 1, 11, -1) for d in ("", "1", "1|", "ab") for n in (0, 1, 11)}
    assert len(keys) == 4 * 4 * 3
    assert noise_key(3, "abc", 1) == noise_key(3, b"abc", 1)
    # Golden: blake2b(b"0|0|", 8 bytes, person "diffsr-noise"); another value would change every published output.
    assert noise_key(0, "", 0) == (0xB5476BC0, 0x9EFF3787)


def test_a_large_field_costs_little() -> None:
    start = time.process_time()
    gaussian(KEY, channels=48, height=256, width=256, step=0)
    assert time.process_time() - start < 5  # 0.2 s of processor time on two cores of 2025


@pytest.mark.parametrize("changes", [{"channels": 0}, {"height": 0}, {"width": -1}, {"step": -1}, {"step": 2**32}])
def test_an_impossible_window_is_refused_by_name(changes: dict[str, int]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name} is {changes[name]}: it must be"):
        field(**changes)


def test_an_impossible_key_counter_or_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="key is"):
        gaussian((2**32, 0), channels=1, height=1, width=1, step=0)
    with pytest.raises(ValueError, match="counter is torch.int32"):
        philox4x32(torch.zeros(4, dtype=torch.int32), KEY)
    with pytest.raises(ValueError, match="sample is -1"):
        noise_key(0, "", -1)
