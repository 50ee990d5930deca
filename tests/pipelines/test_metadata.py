"""Laws of pipelines.metadata: what the source said of itself is kept where it stays true; nothing else is added."""

import io
import struct
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

from pipelines import images, metadata
from pipelines.metadata import ALGORITHMICALLY_ENHANCED, TRAINED_COMPOSITE, is_upscaled, output_exif, output_xmp

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
TIFF, DC = "{http://ns.adobe.com/tiff/1.0/}", "{http://purl.org/dc/elements/1.1/}"
OURS = {"software": "DiffSR 0.1.0", "model": "abc", "recipe": "def", "method": "diffusion"}
CAMERA = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<r:Description r:about="uuid:1" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" tiff:Orientation="6" tiff:ImageWidth="40"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture">
<dc:title><r:Alt><r:li xml:lang="x-default">Caf\u00e9 &amp; &lt;b&gt;</r:li></r:Alt></dc:title>
<tiff:ImageLength>56</tiff:ImageLength></r:Description></r:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()


def exif_block(*, order=">", thumbnail=b"", maker=b"maker's notes, 24 bytes!", width=40, height=56):
    """Return EXIF with a camera, a place, a size and a thumbnail, by Pillow; `maker` is any bytes."""
    header = b"MM\0*\0\0\0\x08" if order == ">" else b"II*\0\x08\0\0\0"
    directory = ImageFileDirectory_v2(ifh=header)
    directory[256], directory[257] = width, height
    directory[271], directory[272], directory[274], directory[306] = "Maker", "Model 7", 6, "2021:02:03 04:05:06"
    directory[282] = directory[283] = IFDRational(300, 1)
    directory[296] = 2
    directory[34665] = {36867: "2021:02:03 04:05:06", 33434: IFDRational(1, 250), 37500: maker}
    directory[34665] |= {40962: width, 40963: height, 37396: (20, 28), 40961: 1}
    directory[34853] = {1: "N", 2: (IFDRational(46), IFDRational(30), IFDRational(11, 2))}
    data = header + directory.tobytes(8)
    if not thumbnail:
        return data
    first = struct.unpack(order + "I", data[4:8])[0]
    count = struct.unpack_from(order + "H", data, first)[0]
    data += bytes(len(data) % 2)
    link = first + 2 + 12 * count
    data = data[:link] + struct.pack(order + "I", len(data)) + data[link + 4 :]
    second = struct.pack(order + "HHHII", 2, 513, 4, 1, len(data) + 30)
    return data + second + struct.pack(order + "HHIII", 514, 4, 1, len(thumbnail), 0) + thumbnail


def parsed(exif):
    found = Image.Exif()
    found.load(exif)
    return found, dict(found.get_ifd(34665)), dict(found.get_ifd(34853)), dict(found.get_ifd(ExifTags.IFD.IFD1))


@pytest.mark.parametrize("order", [">", "<"])
def test_exif_is_upright_of_the_new_size_without_thumbnail_and_else_what_it_was(order):
    source = exif_block(order=order, thumbnail=b"\xff\xd8" + b"the old small picture" * 9)
    assert parsed(source)[3][514] == 191  # Pillow sees a thumbnail before
    made = output_exif(b"Exif\0\0" + source, height=70_000, width=160)
    before, details, place, _ = parsed(source)
    after, new_details, new_place, thumbnail = parsed(made)
    assert (after[274], after[256], after[257]) == (1, 160, 70_000)
    assert (new_details[40962], new_details[40963]) == (160, 70_000) and 37396 not in new_details
    changed = {256, 257, 274, 34665, 34853, 40962, 40963, 37396}
    for old, new in ((before, after), (details, new_details), (place, new_place)):
        assert {k: v for k, v in old.items() if k not in changed} == {k: v for k, v in new.items() if k not in changed}
    assert not thumbnail and b"small picture" not in made and len(made) < len(source) - 191


def test_makers_notes_stay_where_they_were_as_they_count_from_the_start():
    source = exif_block(maker=b"\1\2\3notes" * 30, thumbnail=b"x" * 50)
    made = output_exif(source, height=1, width=1)
    assert made.index(b"\1\2\3notes" * 30) == source.index(b"\1\2\3notes" * 30)


def test_exif_without_a_size_gets_none_and_twice_is_once():
    exif = Image.Exif()
    exif[271] = "Maker"
    made = output_exif(exif.tobytes(), height=5, width=6)
    assert dict(parsed(made)[0]) == {271: "Maker"}
    block = exif_block(thumbnail=b"x" * 50)
    once = output_exif(block, height=5, width=6)
    assert output_exif(once, height=5, width=6) == once == output_exif(block, height=5, width=6)


def test_broken_exif_is_dropped_wherever_it_is_cut_and_never_raises():
    source = exif_block(thumbnail=b"x" * 50)
    inside = len(output_exif(source, height=9, width=9))
    for keep in range(inside - 1):
        assert output_exif(source[:keep], height=9, width=9) is None, keep
    random = np.random.default_rng(0)
    for _ in range(500):
        noisy = bytearray(source)
        for at in random.integers(0, len(noisy), 3):
            noisy[at] = random.integers(0, 256)
        made = output_exif(bytes(noisy), height=9, width=9)
        assert made is None or len(made) <= len(noisy)
    assert output_exif(None, height=1, width=1) is None and output_exif(b"", height=1, width=1) is None
    assert output_exif(source, height=1, width=1, limit_bytes=100) is None
    loop = b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 34665, 4, 1, 8) + bytes(4)
    assert output_exif(loop, height=1, width=1) is None


def test_the_resolution_is_read_in_both_units_and_else_there_is_none():
    assert metadata.resolution(exif_block()) == pytest.approx(300 / 25.4)
    exif = Image.Exif()
    exif[282], exif[296] = 118.0, 3
    assert metadata.resolution(exif.tobytes()[6:]) == pytest.approx(11.8)
    exif[282] = 0.0
    assert metadata.resolution(exif.tobytes()[6:]) is None
    assert metadata.resolution(None) is None and metadata.resolution(b"MM\0*") is None


def test_a_resolution_beside_no_exif_becomes_exif():
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, "PNG", dpi=(300, 300))
    image = Image.open(out)
    image.load()
    assert metadata.resolution(metadata.stored_exif(image)) == pytest.approx(300 / 25.4, rel=1e-5)
    assert metadata.stored_exif(Image.new("L", (4, 4))) is None


def properties(xmp):
    """Return all properties of a packet as {tag: [text, ...]}, attributes too, by another parser."""
    root = ET.fromstring(xmp.decode())
    found = {}
    for description in root.iter(f"{RDF}Description"):
        for name, text in [
            *description.attrib.items(),
            *((child.tag, "".join(child.itertext())) for child in description),
        ]:
            found.setdefault(name, []).append(text.strip())
    return found


def test_xmp_keeps_what_is_true_and_says_what_made_the_output():
    found = properties(output_xmp(CAMERA, source_type=TRAINED_COMPOSITE, **OURS))
    assert found[f"{TIFF}Orientation"] == ["1"] and found[f"{DC}title"] == ["Caf\u00e9 & <b>"]
    assert f"{TIFF}ImageWidth" not in found and f"{TIFF}ImageLength" not in found
    assert found["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == [TRAINED_COMPOSITE]
    assert set(found[f"{RDF}about"]) == {"uuid:1"}
    ours = {name.removeprefix(f"{{{metadata.NAMESPACE}}}"): text for name, text in found.items() if "diffsr" in name}
    assert ours == {"Software": ["DiffSR 0.1.0"], "Model": ["abc"], "Recipe": ["def"], "Method": ["diffusion"]}


def test_the_orientation_as_an_element_is_reset_as_well():
    packet = CAMERA.replace(b' tiff:Orientation="6"', b"").replace(
        b"<dc:title>", b"<tiff:Orientation>6</tiff:Orientation><dc:title>"
    )
    assert properties(output_xmp(packet, source_type=TRAINED_COMPOSITE, **OURS))[f"{TIFF}Orientation"] == ["1"]


def test_a_second_pass_says_it_once_and_gives_the_same_bytes():
    once = output_xmp(CAMERA, source_type=TRAINED_COMPOSITE, **OURS)
    assert output_xmp(once, source_type=TRAINED_COMPOSITE, **OURS) == once
    other = properties(output_xmp(once, source_type=ALGORITHMICALLY_ENHANCED, **OURS | {"method": "bicubic"}))
    assert other[f"{{{metadata.NAMESPACE}}}Method"] == ["bicubic"]
    assert other["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == [ALGORITHMICALLY_ENHANCED]


HOSTILE = {
    "none": None,
    "entities": b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>' + CAMERA.replace(b"uuid:1", b"&c;"),
    "too much": CAMERA.replace(b"<r:Alt>", b"<r:Alt>" + b" " * (1 << 20)),
    "cut": CAMERA[:300],
    "no rdf": b"<a/>",
    "two rdf": CAMERA[CAMERA.index(b"<x:") : -len(b'<?xpacket end="w"?>')].join([b"<a>", b"</a>"]).replace(b"", b"", 0)
    .replace(b"</r:RDF>", b"</r:RDF><r:RDF xmlns:r='http://www.w3.org/1999/02/22-rdf-syntax-ns#'/>"),
    "utf-16": CAMERA.decode().encode("utf-16"),
    "deep": CAMERA.replace(b"<r:Alt>", b"<a>" * 5000).replace(b"</r:Alt>", b"</a>" * 5000),
    "bytes": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_packet_that_cannot_be_trusted_is_replaced_by_a_fresh_one(name):
    fresh = output_xmp(None, source_type=TRAINED_COMPOSITE, **OURS)
    assert output_xmp(HOSTILE[name], source_type=TRAINED_COMPOSITE, **OURS) == fresh
    assert not is_upscaled(HOSTILE[name])
    found = properties(fresh)
    assert f"{DC}title" not in found and len(found) == 6


def test_a_packet_that_would_not_fit_is_replaced():
    fresh = output_xmp(None, source_type=TRAINED_COMPOSITE, **OURS)
    long = CAMERA.replace(b"Caf", b"Caf" * 9000)
    assert output_xmp(long, source_type=TRAINED_COMPOSITE, **OURS, limit_bytes=20_000) == fresh
    assert len(output_xmp(long, source_type=TRAINED_COMPOSITE, **OURS)) > 27_000


def test_a_result_is_recognised_by_what_it_says_and_not_by_a_mention():
    assert is_upscaled(output_xmp(CAMERA, source_type=TRAINED_COMPOSITE, **OURS))
    assert is_upscaled(output_xmp(None, source_type=TRAINED_COMPOSITE, **OURS))
    assert not is_upscaled(CAMERA) and not is_upscaled(None)
    assert not is_upscaled(CAMERA.replace(b"Caf", metadata.NAMESPACE.encode()))


def file_of(format, **options):
    out = io.BytesIO()
    Image.linear_gradient("L").resize((56, 40)).convert("RGB").save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_exif_and_xmp_of_the_file_are_beside_the_pixels(format):
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 1
    exif.get_ifd(34665)[36867] = "2021:02:03 04:05:06"
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode())
    tags = ImageFileDirectory_v2()
    tags[700] = packet
    options = {"PNG": {"pnginfo": info}, "TIFF": {"tiffinfo": tags}}.get(format, {"xmp": packet})
    if format == "TIFF":
        tags[271], tags[34665] = "Maker", {36867: "2021:02:03 04:05:06"}
    else:
        options["exif"] = exif
    found = images.decode(file_of(format, **options))
    read = Image.Exif()
    read.load(found.exif)
    assert read[271] == "Maker" and read.get_ifd(34665)[36867] == "2021:02:03 04:05:06"
    assert found.exif[:2] in (b"II", b"MM") and found.xmp == packet
    plain = images.decode(file_of(format))
    assert (plain.exif, plain.xmp) == (None, None)


def test_notes_of_arrays_and_places_of_pixels_are_no_exif_of_a_tiff():
    tags = ImageFileDirectory_v2()
    tags[270], tags[305] = '{"shape": [40, 56, 3]}', "tifffile.py"
    read = Image.Exif()
    read.load(images.decode(file_of("TIFF", tiffinfo=tags)).exif)
    assert dict(read) == {305: "tifffile.py"}
