"""Laws of stills: alpha, grey, orientation and profile survive; what is measured is what is published."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.pixels import bicubic
from diffsr_core.resize import downscale_pixels
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import encoders, pictures, stills
from pipelines.images import Refused
from pipelines.stills import StillSettings

SCALE = 2


@pytest.fixture(scope="module")
def upscaler():
    torch.manual_seed(0)
    encoder = RRDBConfig(scale=SCALE, num_features=4, num_blocks=3, head="pixel_shuffle")
    model = SuperResolver(ModelConfig(encoder=encoder, denoiser=None, anchor="regression"))
    return Upscaler(model, SamplingRecipe(tile=32, halo=4))


def upscale_picture(upscaler, data, **settings):
    return pictures.upscale_picture(upscaler, data, settings=StillSettings(**settings), model="digest")


def photo(height=20, width=28, colours=3):
    """Return a smooth uint8 HWC picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [30 + 7 * x, 40 + 9 * y, 220 - 3 * x - 2 * y][:colours]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def file_of(pixels, format="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(np.squeeze(pixels)).save(out, format=format, **options)
    return out.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def reduced(data, mode="RGB"):
    """Return the published file, decoded by Pillow and shrunk, without any code of pipelines."""
    pixels = np.atleast_3d(np.asarray(opened(data).convert(mode)))
    return downscale_pixels(pixels, SCALE)


def psnr(a, b):
    return 10 * np.log10(255.0**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def test_the_result_is_the_source_enlarged_and_keeps_to_it(upscaler):
    result = upscale_picture(upscaler, file_of(photo()))
    assert (result.format, opened(result.data).size) == ("PNG", (56, 40))
    assert psnr(reduced(result.data), photo()) > 45
    assert result.metrics["colour_drift"] < 1


def test_the_same_bytes_come_out_each_time_and_for_any_number_in_flight(upscaler):
    data = file_of(photo(40, 50))
    other = Upscaler(upscaler.model, upscaler.recipe, in_flight=3)
    assert upscale_picture(upscaler, data) == upscale_picture(upscaler, data) == upscale_picture(other, data)


def test_alpha_is_enlarged_by_bicubic_and_the_colour_is_that_of_the_opaque_picture(upscaler):
    alpha = photo()[:, :, :1] // 2 * 2
    result = opened(upscale_picture(upscaler, file_of(np.dstack([photo(), alpha]))).data)
    assert result.mode == "RGBA"
    made = np.asarray(result)
    assert np.array_equal(made[:, :, 3], bicubic(alpha, SCALE)[:, :, 0])
    opaque = np.asarray(opened(upscale_picture(upscaler, file_of(photo())).data))
    assert np.array_equal(made[:, :, :3], opaque)


def test_grey_stays_grey(upscaler):
    result = upscale_picture(upscaler, file_of(photo(colours=1)))
    assert opened(result.data).mode == "L" and psnr(reduced(result.data, "L"), photo(colours=1)) > 45


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("format", ["png", "webp", "tiff"])
def test_grey_can_be_written_in_every_format_and_is_measured_there(upscaler, format, alpha):
    grey = photo(colours=1)
    data = file_of(np.dstack([grey, grey]) if alpha else grey)
    result = upscale_picture(upscaler, data, format=format, quality=100)
    assert result.format == format.upper()
    assert result.metrics["lr_psnr"] == pytest.approx(psnr(reduced(result.data, "L"), grey), abs=0.01)


def test_a_jpeg_is_turned_upright_before_it_is_enlarged(upscaler):
    exif = Image.Exif()
    exif[274] = 6
    data = file_of(photo(), "JPEG", quality=100, subsampling=0, exif=exif)
    upright = np.rot90(np.asarray(opened(data)), -1)  # orientation 6: turn clockwise
    result = upscale_picture(upscaler, data)
    assert opened(result.data).size == (40, 56) and opened(result.data).getexif().get(274, 1) == 1
    assert psnr(reduced(result.data), upright) > 35


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_colour_profile_is_kept(upscaler, format):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = file_of(photo(), format, icc_profile=profile)
    result = upscale_picture(upscaler, data)
    assert (result.format, opened(result.data).info["icc_profile"]) == (format, profile)
    assert "icc_profile" not in opened(upscale_picture(upscaler, file_of(photo(), format)).data).info


def test_lr_psnr_and_drift_are_those_of_the_decoded_published_file(upscaler):
    values = []
    for quality in (30, 95):
        result = upscale_picture(upscaler, file_of(photo()), format="jpeg", quality=quality)
        assert result.metrics["lr_psnr"] == pytest.approx(psnr(reduced(result.data), photo()), abs=1e-6)
        drift = np.abs(np.asarray(opened(result.data)).mean(axis=(0, 1)) - photo().mean(axis=(0, 1))).max()
        assert result.metrics["colour_drift"] == pytest.approx(drift, abs=1e-9)
        values.append(result.metrics["lr_psnr"])
    lossless = upscale_picture(upscaler, file_of(photo())).metrics["lr_psnr"]
    assert values[0] + 1 < values[1] < lossless


class Spy(Upscaler):
    """An upscaler that notes what its noise is keyed by."""

    def __init__(self, upscaler):
        super().__init__(upscaler.model, upscaler.recipe)
        self.digests = []

    def window(self, pixels, window, *, digest):
        self.digests.append(digest)
        return super().window(pixels, window, digest=digest)


def test_the_noise_is_keyed_by_the_content_of_the_file_or_by_its_folder(upscaler):
    spy, first, second = Spy(upscaler), file_of(photo()), file_of(photo(), compress_level=1)
    for data in (first, first, second):
        upscale_picture(spy, data)
    assert spy.digests[0] == spy.digests[1] != spy.digests[2]
    for data in (first, second):
        upscale_picture(spy, data, noise="folder")
    assert spy.digests[3] == spy.digests[4] not in spy.digests[:3]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty_file"), (b"<html>", "not_an_image"), (file_of(photo())[:60], "truncated")],
)
def test_a_refusal_of_the_decoder_passes_through(upscaler, data, reason):
    with pytest.raises(Refused) as caught:
        upscale_picture(upscaler, data)
    assert caught.value.reason == reason


def test_a_picture_beyond_the_limit_is_refused_and_its_larger_result_is_not(upscaler):
    data, megapixels = file_of(photo()), 20 * 28 / 1e6
    assert upscale_picture(upscaler, data, max_megapixels=megapixels).format == "PNG"
    with pytest.raises(Refused, match="too_large"):
        upscale_picture(upscaler, data, max_megapixels=megapixels * 0.99)


class Never(Upscaler):
    """An upscaler that must not be asked."""

    def window(self, pixels, window, *, digest):
        pytest.fail("the network ran for a result that cannot be written")


def test_alpha_that_the_wanted_format_cannot_store_is_refused_before_any_work(upscaler):
    data = file_of(np.dstack([photo(), photo()[:, :, :1]]))
    with pytest.raises(Refused) as caught:
        upscale_picture(Never(upscaler.model, upscaler.recipe), data, format="jpeg")
    assert (caught.value.stage, caught.value.reason) == ("encode", "alpha")


@pytest.mark.parametrize(("format", "side"), [("webp", 8192), ("jpeg", 32751)])
def test_a_result_that_the_format_cannot_hold_is_refused_before_any_work_and_tiff_is_offered(upscaler, format, side):
    data = file_of(np.zeros((1, side, 3), np.uint8))
    with pytest.raises(Refused, match="tiff") as caught:
        upscale_picture(Never(upscaler.model, upscaler.recipe), data, format=format)
    assert (caught.value.stage, caught.value.reason) == ("encode", "format_limit")


def upscaler_of(channels):
    encoder = RRDBConfig(scale=SCALE, num_features=4, num_blocks=2, head="pixel_shuffle", channels=channels)
    model = SuperResolver(ModelConfig(encoder=encoder, denoiser=None, anchor="regression"))
    return Upscaler(model, SamplingRecipe(tile=32, halo=4))


@pytest.mark.parametrize(("channels", "colours"), [(1, 3), (4, 3), (2, 3)])
@pytest.mark.parametrize("alpha", [False, True])
def test_channels_that_the_model_does_not_read_are_refused_with_both_numbers(channels, colours, alpha):
    pixels = photo(colours=colours)
    data = file_of(np.dstack([pixels, pixels[:, :, :1]]) if alpha else pixels)
    with pytest.raises(Refused, match=rf"channels \({colours}\) must be {channels}") as caught:
        upscale_picture(upscaler_of(channels), data)
    assert (caught.value.stage, caught.value.reason) == ("upscale", "channels")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_is_read_by_a_model_of_any_channels_and_stays_grey(channels):
    result = upscale_picture(upscaler_of(channels), file_of(photo(colours=1)))
    assert (opened(result.data).mode, opened(result.data).size) == ("L", (56, 40))


class Failing(Upscaler):
    """An upscaler that raises."""

    def __init__(self, upscaler, error):
        super().__init__(upscaler.model, upscaler.recipe)
        self.error = error

    def window(self, pixels, window, *, digest):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_as_oom(upscaler, error):
    with pytest.raises(Refused) as caught:
        upscale_picture(Failing(upscaler, error), file_of(photo()))
    assert caught.value.reason == "oom"


@pytest.mark.parametrize(("module", "step"), [(stills, "bicubic"), (encoders, "encode"), (stills, "Fidelity")])
def test_a_lack_of_memory_at_any_step_is_refused_as_oom(upscaler, monkeypatch, module, step):
    def lacking(*_, **__):
        raise MemoryError

    monkeypatch.setattr(module, step, lacking)
    with pytest.raises(Refused) as caught:
        upscale_picture(upscaler, file_of(np.dstack([photo(), photo()[:, :, :1]])))
    assert (caught.value.stage, caught.value.reason) == ("upscale", "oom")


def test_torch_words_a_lack_of_memory_as_we_expect():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("bug"), IndexError("bug")])
def test_a_bug_is_not_taken_for_bad_data(upscaler, error):
    with pytest.raises(type(error), match=str(error)):
        upscale_picture(Failing(upscaler, error), file_of(photo()))


@pytest.mark.parametrize(
    ("key", "source", "wanted", "expected"),
    [
        ("a/b.jpg", "JPEG", "keep", "a/b.jpg"),
        ("a/b.jpg", "JPEG", "jpeg", "a/b.jpg"),
        ("a/b.jpeg", "JPEG", "png", "a/b.jpeg.png"),
        ("a/b.png", "PNG", "jpeg", "a/b.png.jpg"),
        ("a/b.tif", "TIFF", "webp", "a/b.tif.webp"),
        ("a/b.webp", "WEBP", "tiff", "a/b.webp.tif"),
        ("a/b.bmp", "BMP", "keep", "a/b.bmp.png"),
        ("a/b.gif", "GIF", "keep", "a/b.gif.png"),
        ("a/b.ppm", "PPM", "keep", "a/b.ppm.png"),
        ("noext", "PNG", "keep", "noext"),
    ],
)
def test_a_key_is_kept_with_its_format_and_grows_an_extension_with_another(key, source, wanted, expected):
    assert StillSettings(format=wanted).output_key(key, source) == expected


def test_names_that_differ_only_in_their_extension_never_collide():
    sources = {"a.jpg": "JPEG", "a.png": "PNG", "a.webp": "WEBP", "a.tif": "TIFF", "a.bmp": "BMP", "a.gif": "GIF"}
    for wanted in ("keep", "png", "jpeg", "webp", "tiff"):
        keys = [StillSettings(format=wanted).output_key(key, format) for key, format in sources.items()]
        assert len(set(keys)) == len(sources), wanted


def test_the_target_is_what_is_asked_or_the_nearest_that_can_be_written():
    assert [StillSettings().target(name) for name in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")] == [
        "PNG", "JPEG", "WEBP", "TIFF", "PNG", "PNG", "PNG",
    ]  # fmt: skip
    assert StillSettings(format="webp").target("BMP") == "WEBP"
