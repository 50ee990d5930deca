"""Laws of pipelines.sheets: a sheet is the array that was written into it, in memory and in a file alike."""

import os
import tempfile

import numpy as np
import pytest
import tifffile

from pipelines.sheets import Sheet


def windows(height, width, *, seed):
    """Return the boxes of a grid of odd sizes, in random order, and some that overlap it."""
    random = np.random.default_rng(seed)
    boxes = [(y, x, min(13, height - y), min(17, width - x)) for y in range(0, height, 13) for x in range(0, width, 17)]
    boxes += [(y, 0, min(5, height - y), width) for y in range(0, height, 21)]  # whole rows, which go another way
    random.shuffle(boxes)
    return boxes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spool_bytes", [0, 1 << 20])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 3), (127, 129)])
def test_windows_in_any_order_make_the_array_that_numpy_makes(height, width, channels, dtype, spool_bytes):
    random = np.random.default_rng(3)
    want = np.zeros((height, width, channels), dtype)
    with Sheet(height, width, channels, dtype, spool_bytes=spool_bytes) as sheet:
        assert (sheet.memory is None) == (spool_bytes == 0)
        for y, x, h, w in windows(height, width, seed=height):
            block = random.integers(0, np.iinfo(dtype).max, (h, w, channels), dtype, endpoint=True)
            want[y : y + h, x : x + w] = block
            sheet.write(y, x, block)
        for top in range(0, height, 11):
            np.testing.assert_array_equal(sheet.rows(top, min(height, top + 11)), want[top : top + 11])
        np.testing.assert_array_equal(sheet.rows(0, height), want)
        assert sheet.rows(0, 0).shape == (0, width, channels)


def test_what_was_not_written_is_zero_and_a_block_need_not_be_contiguous():
    block = np.arange(60, dtype=np.uint16).reshape(4, 5, 3)
    for spool_bytes in (0, 1 << 20):
        with Sheet(10, 9, 3, np.uint16, spool_bytes=spool_bytes) as sheet:
            sheet.write(2, 1, block[::-1, ::2])
            found = sheet.rows(0, 10)
            np.testing.assert_array_equal(found[2:6, 1:4], block[::-1, ::2])
            assert found.sum() == block[::-1, ::2].sum()


def test_rows_are_a_copy_that_may_be_changed():
    for spool_bytes in (0, 1 << 20):
        with Sheet(4, 4, 1, np.uint8, spool_bytes=spool_bytes) as sheet:
            rows = sheet.rows(0, 4)
            rows[:] = 9
            assert sheet.rows(0, 4).max() == 0


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16), (4, np.uint8)])
def test_the_stream_of_a_spooled_sheet_is_a_tiff_that_others_read(channels, dtype, tmp_path):
    random = np.random.default_rng(4)
    block = random.integers(0, np.iinfo(dtype).max, (301, 977, channels), dtype)
    with Sheet(301, 977, channels, dtype, spool_bytes=0) as sheet:
        sheet.write(0, 0, block)
        (tmp_path / "a.tif").write_bytes(sheet.read_at(0, sheet.stream_bytes + 99))
        assert (tmp_path / "a.tif").stat().st_size == sheet.stream_bytes
    np.testing.assert_array_equal(np.atleast_3d(tifffile.imread(tmp_path / "a.tif")), block)


def test_a_spooled_sheet_has_no_name_and_its_disk_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    sheet = Sheet(1000, 1000, 3, np.uint8, spool_bytes=0)
    sheet.write(0, 0, np.ones((1000, 1000, 3), np.uint8))
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before + 1
    sheet.close()
    sheet.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        sheet.rows(0, 1)


def test_memory_does_not_grow_with_a_spooled_sheet():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    band = np.full((256, 8192, 3), 7, np.uint8)  # 6 MiB of 192
    with Sheet(8192, 8192, 3, np.uint8, spool_bytes=1 << 20) as sheet:
        start = resident()
        for y in range(0, 8192, 256):
            sheet.write(y, 0, band)
        assert all(sheet.rows(y, y + 256).min() == 7 for y in range(0, 8192, 1024))
        assert resident() - start < 40 << 20


@pytest.mark.parametrize("spool_bytes", [0, 1 << 20])
def test_what_does_not_fit_is_a_mistake_and_changes_nothing(spool_bytes):
    with Sheet(6, 8, 3, np.uint8, spool_bytes=spool_bytes) as sheet:
        for y, x, shape in (
            (-1, 0, (1, 1, 3)),
            (0, 7, (1, 2, 3)),
            (5, 0, (2, 1, 3)),
            (0, 0, (1, 1, 1)),
            (0, 0, (1, 1)),
        ):
            with pytest.raises(ValueError, match="block"):
                sheet.write(y, x, np.ones(shape, np.uint8))
        with pytest.raises(ValueError, match="uint8"):
            sheet.write(0, 0, np.ones((1, 1, 3), np.uint16))
        for top, bottom in ((-1, 2), (3, 2), (0, 7)):
            with pytest.raises(ValueError, match="rows"):
                sheet.rows(top, bottom)
        assert sheet.rows(0, 6).max() == 0
    for size in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Sheet(*size, np.uint8)
    with pytest.raises(ValueError, match="dtype"):
        Sheet(1, 1, 1, np.float32)
