"""Laws of tiling: the cores partition the canvas, and how the tiles run cannot be seen in the result."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from diffsr_core.batching import Exchange, Network
from diffsr_core.tiling import Tile, fuse, padded_size, spans, tiles

TILES = [(1, 0), (2, 0), (3, 1), (4, 1), (8, 0), (8, 3), (16, 4), (17, 8), (64, 8)]


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers as floats: their sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


KERNEL = integers(2, 2, 3, 3, seed=9)


def convolve(inputs: list[Tensor]) -> list[Tensor]:
    return [conv2d(inputs[0], KERNEL, padding=1)]


def fused(
    function: Network, canvases: Sequence[Tensor], plan: Sequence[Tile], *, tile: int, micro_batch: int
) -> list[Tensor]:
    """fuse, whose tiles are asked for in calls of micro_batch."""
    exchange = Exchange({"network": function}, size=micro_batch)
    with exchange.member() as member:
        return fuse(lambda asked: exchange.ask(member, "network", asked), canvases, plan, tile=tile)


@pytest.mark.parametrize(("tile", "halo"), TILES)
def test_the_cores_partition_every_size(tile: int, halo: int) -> None:
    for size in range(tile, tile + 200):
        plan = spans(size, tile, halo)
        assert [i for _, start, stop in plan for i in range(start, stop)] == list(range(size))
        assert all(start < stop for _, start, stop in plan)


@pytest.mark.parametrize(("tile", "halo"), TILES)
def test_every_tile_lies_inside_and_keeps_its_halo_except_at_the_canvas_border(tile: int, halo: int) -> None:
    for size in range(tile, tile + 200):
        for origin, start, stop in spans(size, tile, halo):
            assert origin >= 0 and origin + tile <= size
            assert start - origin >= halo or start == origin == 0
            assert origin + tile - stop >= halo or stop == origin + tile == size


def test_a_plan_covers_each_pixel_of_the_canvas_once() -> None:
    for height, width in ((64, 64), (65, 64), (70, 200), (131, 97)):
        covered = torch.zeros(height, width)
        for w in tiles(height, width, tile=64, halo=8):
            covered[w.core_top : w.core_bottom, w.core_left : w.core_right] += 1
            assert w.top <= w.core_top < w.core_bottom <= w.top + 64 <= height
            assert w.left <= w.core_left < w.core_right <= w.left + 64 <= width
        assert torch.equal(covered, torch.ones(height, width))


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_tiles_begin_on_the_stride_when_the_settings_lie_on_it(stride: int) -> None:
    for tile in range(stride, 8 * stride, stride):
        for halo in range(0, (tile + 1) // 2, stride):
            if tile <= 2 * halo:
                continue
            for size in range(tile, 5 * tile, stride):
                assert all(origin % stride == 0 for origin, _, _ in spans(size, tile, halo))


def test_a_canvas_is_the_smallest_that_holds_a_tile_and_ends_on_the_stride() -> None:
    for stride in (1, 2, 8):
        for size in range(1, 200):
            found = padded_size(size, tile=64, stride=stride)
            assert found == min(c for c in range(64, 300) if c >= size and c % stride == 0)


@pytest.mark.parametrize(("tile", "halo"), [(8, 1), (8, 3), (16, 5)])
def test_a_convolution_within_the_halo_is_exactly_that_of_the_whole_canvas(tile: int, halo: int) -> None:
    for height, width in ((16, 16), (17, 31), (40, 23)):
        canvas = integers(1, 2, height, width)
        plan = tiles(height, width, tile=tile, halo=halo)
        (found,) = fused(convolve, [canvas], plan, tile=tile, micro_batch=3)
        assert torch.equal(found, conv2d(canvas, KERNEL, padding=1))


def test_a_convolution_wider_than_the_halo_shows_its_seams_and_only_there() -> None:
    canvas = integers(1, 2, 16, 24)
    (found,) = fused(convolve, [canvas], tiles(16, 24, tile=8, halo=0), tile=8, micro_batch=4)
    wrong = (found != conv2d(canvas, KERNEL, padding=1)).any(dim=1)[0]
    seams = torch.zeros(16, 24, dtype=torch.bool)
    seams[[7, 8]] = True
    seams[:, [7, 8, 15, 16]] = True
    assert wrong.any() and not (wrong & ~seams).any()


def test_canvases_of_several_resolutions_are_cut_and_joined_at_the_same_places() -> None:
    lr, big = integers(1, 2, 20, 29), integers(1, 2, 60, 87, seed=1)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        small, large = inputs
        enlarged = interpolate(small, scale_factor=3, mode="nearest")
        return [conv2d(large, KERNEL, padding=1) + enlarged, small * 2, interpolate(large, scale_factor=2)]

    found = fused(function, [lr, big], tiles(20, 29, tile=8, halo=2), tile=8, micro_batch=2)
    for ours, whole in zip(found, function([lr, big]), strict=True):
        assert torch.equal(ours, whole)


def test_neither_the_order_of_the_tiles_nor_the_number_in_flight_changes_a_byte() -> None:
    generator = torch.Generator().manual_seed(4)
    canvas = torch.randn(1, 2, 50, 70, generator=generator)
    kernel = torch.randn(2, 2, 3, 3, generator=generator)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        return [conv2d(inputs[0], kernel, padding=1)]

    plan = tiles(50, 70, tile=16, halo=4)
    (first,) = fused(function, [canvas], plan, tile=16, micro_batch=4)
    exchange = Exchange({"network": function}, size=4)

    def shuffled(seed: int) -> Tensor:
        order = list(plan)
        random.Random(seed).shuffle(order)
        with exchange.member() as member:
            (out,) = fuse(lambda asked: exchange.ask(member, "network", asked), [canvas], order, tile=16)
        return out

    with ThreadPoolExecutor(3) as pool:
        found = [first, *map(shuffled, range(2)), *pool.map(shuffled, range(2, 8))]
    assert len({out.numpy().tobytes() for out in found}) == 1


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 50])
def test_every_call_has_one_shape_and_what_is_missing_is_zero(micro_batch: int) -> None:
    lr, big = torch.ones(1, 2, 24, 30), torch.ones(1, 5, 48, 60)
    plan = tiles(24, 30, tile=8, halo=1)
    real = 0

    def function(inputs: list[Tensor]) -> list[Tensor]:
        nonlocal real
        assert inputs[0].shape == (micro_batch, 2, 8, 8) and inputs[1].shape == (micro_batch, 5, 16, 16)
        filled = [bool(row.all()) for row in inputs[0]]
        assert filled == sorted(filled, reverse=True)
        assert [bool(row.all()) for row in inputs[1]] == filled == [bool(row.any()) for row in inputs[0]]
        real += sum(filled)
        return [inputs[0]]

    fused(function, [lr, big], plan, tile=8, micro_batch=micro_batch)
    assert real == len(plan)


def test_a_tile_is_read_where_the_plan_says() -> None:
    canvas = torch.arange(12 * 10, dtype=torch.float32).view(1, 1, 12, 10)
    plan = [
        Tile(top=0, left=0, core_top=0, core_bottom=5, core_left=0, core_right=10),
        Tile(top=2, left=0, core_top=5, core_bottom=12, core_left=0, core_right=10),
    ]
    seen: list[Tensor] = []
    (found,) = fused(
        lambda inputs: seen.append(inputs[0]) or inputs,  # type: ignore[func-returns-value]
        [canvas],
        plan,
        tile=10,
        micro_batch=1,
    )
    assert torch.equal(seen[0], canvas[:, :, 0:10]) and torch.equal(seen[1], canvas[:, :, 2:12])
    assert torch.equal(found, canvas)


def test_what_is_written_lies_where_the_core_says() -> None:
    canvas = torch.zeros(1, 1, 6, 6)
    numbered = iter(range(1, 10))

    def function(inputs: list[Tensor]) -> list[Tensor]:
        return [torch.full_like(inputs[0], next(numbered))]

    plan = tiles(6, 6, tile=4, halo=1)
    (found,) = fused(function, [canvas], plan, tile=4, micro_batch=1)
    assert [(w.core_bottom, w.core_right) for w in plan] == [(3, 3), (3, 6), (6, 3), (6, 6)]
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert torch.equal(found[0, 0], expected)


def test_the_plan_gives_the_resolution_whatever_canvas_comes_first() -> None:
    # An encoder's features may be larger than the LR, and a canvas may have no channel at all.
    plan = tiles(12, 20, tile=8, halo=2)
    large, small, empty = integers(1, 3, 48, 80), integers(1, 1, 24, 40, seed=1), torch.zeros(1, 0, 12, 20)
    for canvases in ([large, small, empty], [empty, small, large], [small]):
        found = fused(lambda inputs: inputs, canvases, plan, tile=8, micro_batch=2)
        assert all(torch.equal(one, other) for one, other in zip(found, canvases, strict=True))


@pytest.mark.parametrize(("tile", "halo"), [(8, 0), (8, 3), (16, 4), (64, 8)])
def test_a_shifted_grid_partitions_as_well_and_moves_every_cut_but_the_last_by_the_shift(tile: int, halo: int) -> None:
    stride = tile - 2 * halo
    for size in range(tile, tile + 150, 7):
        plain = spans(size, tile, halo)
        for shift in range(stride):
            plan = spans(size, tile, halo, shift=shift)
            assert [i for _, start, stop in plan for i in range(start, stop)] == list(range(size))
            for origin, start, stop in plan:
                assert 0 <= origin <= size - tile
                assert start - origin >= halo or start == origin == 0
                assert origin + tile - stop >= halo or stop == origin + tile == size
            inner = [origin for origin, _, _ in plan[1:-1]]
            assert inner == [k * stride - shift for k in range(1, size) if 0 < k * stride - shift < size - tile]
        assert spans(size, tile, halo, shift=stride) == spans(size, tile, halo, shift=0) == plain


def test_a_canvas_below_the_tile_and_a_halo_without_core_are_errors() -> None:
    with pytest.raises(ValueError, match=r"canvas \(63\).*tile \(64\)"):
        spans(63, 64, 8)
    with pytest.raises(ValueError, match=r"halo \(32\).*at most 31"):
        spans(100, 64, 32)
