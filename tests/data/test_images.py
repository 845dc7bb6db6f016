"""Stored images become upright RGB, whatever their mode; what can't be decoded says why."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import PIL
import pytest
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from optin_cli.data.encoded_files import BrokenFile, encoded
from optin_cli.data.images import decode, to_rgb

BANDS = {"1": 0, "L": 0, "P": 0, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3}
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def stored(image: Image.Image, kind: str = "PNG", **options) -> dict:
    content = BytesIO()
    image.save(content, kind, **options)
    return {"bytes": content.getvalue(), "path": None}


@st.composite
def images(draw, mode: str) -> Image.Image:
    """A random image of a mode."""
    shape = (*draw(SIZES), *([BANDS[mode]] if BANDS[mode] else []))
    pixels = draw(hnp.arrays(np.uint8, shape))
    if mode == "1":
        return Image.fromarray(pixels > 127)
    if mode == "P":
        image = Image.fromarray(pixels).convert("P")
        image.putpalette(draw(st.binary(min_size=768, max_size=768)))
        return image
    if mode in ("CMYK", "YCbCr"):
        height, width = shape[:2]
        return Image.frombytes(mode, (width, height), pixels.tobytes())
    return Image.fromarray(pixels)


def reads_what_it_writes(image: Image.Image) -> bool:
    try:
        Image.open(BytesIO(stored(image, "TIFF")["bytes"])).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", BANDS)
def test_an_image_of_any_mode_is_what_pillow_makes_of_it(mode):
    if mode == "YCbCr" and not reads_what_it_writes(Image.new(mode, (1, 1))):
        pytest.skip(f"Pillow {PIL.__version__} can't read its own TIFF of {mode}")

    @examples(25)
    @given(image=images(mode))
    def check(image):
        assert image.mode == mode
        found = decode(stored(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))

    check()


@examples(40)
@given(grey=hnp.arrays(np.uint16, SIZES), kind=st.sampled_from(["PNG", "TIFF"]))
def test_16_bit_grey_is_scaled_not_clipped(grey, kind):
    found = np.asarray(decode(stored(Image.fromarray(grey), kind)))
    expected = np.round(grey.astype(np.float64) * 255 / 65535)
    assert all(np.array_equal(found[..., band], expected) for band in range(3))


def test_deep_grey_of_other_kinds():
    """Big-endian files, 32-bit integers (as which some versions of Pillow open 16 bits), floats of either range."""
    values = np.array([[0, 257, 25700, 65535]])
    expected = [0, 1, 100, 255]
    big = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert decode(stored(big, "TIFF")).getchannel(0).tobytes() == bytes(expected)
    for deep in (values.astype(np.int32), values / 65535, values / 257):
        image = Image.fromarray(deep.astype(np.int32 if deep.dtype == np.int32 else np.float32))
        assert to_rgb(image).getchannel(1).tobytes() == bytes(expected)


def test_a_palette_with_transparency_keeps_its_colours(recwarn):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    found = decode(stored(image, transparency=bytes([0, 128])))
    assert np.asarray(found).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert not recwarn.list


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(stored(Image.fromarray(pixels), exif=exif))
    assert np.array_equal(np.asarray(found), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize(
    "exif", [b"MM\x00*\x00\x00\x00\x08\x00\x02\x01", b"MM\x00\xa9\x00\x00\x00\x08", b"M"]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_note_of_the_orientation_costs_no_image(exif, kind, recwarn):
    image = Image.new("RGB", (5, 3), (9, 9, 9))
    assert decode(stored(image, kind, exif=b"Exif\x00\x00" + exif)).size == (5, 3)
    assert not recwarn.list


def test_where_images_are(tmp_path):
    content = stored(Image.new("L", (2, 2)))["bytes"]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    places = (content, {"bytes": content, "path": "gone.png"}, {"bytes": None, "path": str(path)})
    for place in (*places, {"bytes": None, "path": path.as_uri()}):
        assert encoded(place) == content


PNG = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)))["bytes"]
JPEG = stored(Image.open(BytesIO(PNG)), "JPEG")["bytes"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"no image at all", "not an image"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "(?i)truncated"),
        (PNG[:29] + bytes(4) + PNG[33:], "not an image"),  # a wrong checksum of the header
        (PNG[:500] + bytes(64) + PNG[564:], "."),
    ],
)
def test_broken_images_say_why(content, why):
    with pytest.raises(BrokenFile, match=why):
        decode({"bytes": content, "path": "a.png"})


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, {"bytes": None}])
def test_a_row_without_an_image(nothing):
    with pytest.raises(BrokenFile, match="there is none"):
        decode(nothing)


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(BrokenFile, match="No such file"):
        decode({"bytes": None, "path": str(tmp_path / "gone.png")})


@examples(150)
@given(
    content=st.sampled_from([PNG, JPEG]), at=st.integers(0, 10**6), junk=st.binary(min_size=1, max_size=40)
)
def test_damage_of_any_kind_gives_an_image_or_a_reason(content, at, junk):
    at %= len(content)
    try:
        assert decode(content[:at] + junk + content[at + len(junk) :]).mode == "RGB"
    except BrokenFile as error:
        assert str(error) and "\n" not in str(error)
