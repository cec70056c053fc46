"""Decoding: every odd picture of the sample set, formats and modes made on the spot, and damaged bytes."""

from __future__ import annotations

import csv
import io
import pickle
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data.decode import ImageError, decode_draft, decode_image, decode_image_reference, read_image


def encode(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 36, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def photo_like() -> Image.Image:
    return Image.fromarray(noise(6, 9)).resize((90, 60), Image.Resampling.BICUBIC)


def outcome(decode, data: bytes) -> np.ndarray | str:
    try:
        return decode(data)
    except ImageError as error:
        return str(error)


def test_sample_images_behave_as_their_manifest_expects(shared_dir):
    folder = shared_dir / "data" / "sample_images"
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 66
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        found, expected = outcome(decode_image, data), row["expected"]
        if isinstance(found, str):
            kind = "too_many_pixels" if "too_many_pixels" in expected else "undecodable"
            assert expected.startswith(("error", "either")) and found.startswith(f"{kind}: "), (row["file"], found)
            continue
        assert not expected.startswith("error"), row["file"]
        with Image.open(folder / row["file"]) as picture:
            upright = ImageOps.exif_transpose(picture)
            assert found.shape == (upright.height, upright.width, 3), row["file"]
        assert found.dtype == np.uint8 and found.flags.writeable
        np.testing.assert_array_equal(found, decode_image_reference(data), err_msg=row["file"])


def test_sample_pictures_in_eight_orientations_show_the_same(shared_dir):
    folder = shared_dir / "data" / "sample_images" / "odd"
    upright = read_image(folder / "exif_1_upright.jpg").astype(int)
    for orientation in (2, 3, 5, 6, 8):
        turned = read_image(folder / f"exif_{orientation}.jpg")
        assert np.abs(turned - upright).mean() < 6, orientation  # the noise of two JPEG encodings; a wrong turn: 40


def test_16_bit_grey_is_scaled_like_its_8_bit_original(shared_dir):
    folder = shared_dir / "data" / "sample_images"
    grey = np.asarray(Image.open(folder / "odd" / "gray16.png")).astype(int) // 257
    np.testing.assert_array_equal(read_image(folder / "odd" / "gray16.png"), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(noise()), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(decode_image(data), expected)


def test_damaged_exif_counts_as_upright():
    data = encode(Image.fromarray(noise()), "JPEG")
    damaged = data[:2] + b"\xff\xe1\x00\x10Exif\x00\x00MM\x00*\xff\xff\xff\xff" + data[2:]
    np.testing.assert_array_equal(decode_image(damaged), decode_image(data))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"optimize": True}]
)
def test_fast_jpegs_have_the_pixels_of_pillow(options):
    for picture in (photo_like(), photo_like().convert("L"), Image.new("RGB", (1, 1)), photo_like().resize((17, 250))):
        data = encode(picture, "JPEG", **options)
        np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_pillow_s(mode, orientation):
    picture = photo_like().resize((900, 610)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, "JPEG", quality=95, exif=exif)
    whole = decode_image(data)
    for size, factor in ((700, 1), (306, 1), (305, 2), (200, 2), (152, 4), (76, 8), (10, 8)):
        image, (width, height) = decode_draft(data, size)
        assert (height, width) == whole.shape[:2]
        wanted = tuple(-(-side // factor) for side in whole.shape[:2])
        assert image.shape == (*wanted, 3)
        if factor > 1:
            pillow = Image.open(io.BytesIO(data))
            pillow.draft(None, (900 // factor, 610 // factor))
            reference = np.asarray(ImageOps.exif_transpose(pillow).convert("RGB"))
            assert reference.shape == image.shape and np.abs(reference.astype(int) - image).max() <= 2
        else:
            np.testing.assert_array_equal(image, whole)


def test_drafts_of_what_is_no_jpeg_or_damaged():
    png = encode(photo_like().resize((900, 610)), "PNG")
    np.testing.assert_array_equal(decode_draft(png, 100)[0], decode_image(png))
    jpeg = encode(photo_like().resize((900, 610)), "JPEG")
    for data in (b"", jpeg[: len(jpeg) // 2], jpeg[:200]):
        assert outcome(lambda data: decode_draft(data, 100)[0], data) == outcome(decode_image, data)
    with pytest.raises(ImageError, match="too_many_pixels"):
        decode_draft(jpeg, 100, max_pixels=1000)


def test_cmyk_jpeg_with_inverted_inks():
    data = encode(photo_like().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(data).astype(int) - np.asarray(photo_like())).mean() < 4


def test_transparency_lies_on_white():
    colour = noise(4, 6, 3)
    alpha = np.array([[0], [128], [255], [255]], np.uint8).repeat(6, 1)
    expected = np.rint((colour * (alpha[..., None] / 255)) + 255 * (1 - alpha[..., None] / 255))
    for format in ("PNG", "TIFF"):
        found = decode_image(encode(Image.fromarray(np.dstack([colour, alpha])), format))
        assert np.abs(found - expected).max() <= 1
        np.testing.assert_array_equal(found[2:], colour[2:])
    grey = decode_image(encode(Image.fromarray(np.dstack([colour[..., 0], alpha])), "PNG"))
    assert (grey[0] == 255).all() and (grey[2:] == colour[2:, :, :1]).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decode_image(encode(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_deep_grey_and_bilevel():
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    assert decode_image(encode(Image.fromarray(deep), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert decode_image(encode(Image.fromarray(deep), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 255]
    wide = np.array([[-5, 256, 65535, 2**30]], np.int32)
    assert decode_image(encode(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 1, 255, 255]
    unit = np.array([[0, 0.5, 1, np.nan]], np.float32)
    assert decode_image(encode(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]
    bytes_ = np.array([[0, 2.4, 200, np.inf]], np.float32)
    assert decode_image(encode(Image.fromarray(bytes_), "TIFF"))[0, :, 0].tolist() == [0, 2, 200, 0]
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert decode_image(encode(bilevel, "PNG")).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    found = decode_image(data)
    assert found.shape == (8, 8, 3) and found[4, 4, 0] > 240 and found[4, 4, 2] < 15


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_truncation_of_a_jpeg_is_undecodable(progressive, mode):
    data = encode(photo_like().convert(mode), "JPEG", progressive=progressive)
    for length in [*range(0, len(data), 7), len(data) - 2, len(data) - 1]:
        with pytest.raises(ImageError) as caught:
            decode_image(data[:length])
        assert caught.value.kind == "undecodable"


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_too_many_pixels_by_the_header_alone():
    for width, height in ((10_001, 10_000), (2**31 - 1, 2**31 - 1), (1, 100_000_001)):
        with pytest.raises(ImageError) as caught:
            decode_image(png_header(width, height))
        assert str(caught.value) == f"too_many_pixels: {width} x {height} pixels, the limit is 100000000"
    with pytest.raises(ImageError, match=r"^undecodable: "):
        decode_image(png_header(10_000, 10_000))  # within the limit, and empty
    with pytest.raises(ImageError, match=r"^too_many_pixels: 36 x 24 "):
        decode_image(encode(Image.fromarray(noise()), "JPEG"), max_pixels=863)
    assert decode_image(encode(Image.fromarray(noise()), "JPEG"), max_pixels=864).shape == (24, 36, 3)


def test_bombs_cost_neither_memory_nor_words(tmp_path):
    bomb = tmp_path / "bomb.gif"
    Image.new("1", (14_000, 12_900)).save(bomb)  # 181 megapixels, beyond Pillow's own error threshold
    code = f"""
import resource
from pipeline.data.decode import ImageError, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image({str(bomb)!r})
except ImageError as error:
    print(error.kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("too_many_pixels True\n", "")


def test_decoding_does_not_import_torch():
    code = "import sys, pipeline.data.decode; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x00" * 100, b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture(data):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.kind == "undecodable" and "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_formats_that_do_not_count():
    with pytest.raises(ImageError, match=r"^undecodable: the content is none of JPEG, "):
        decode_image(encode(Image.fromarray(noise()), "PPM"))


def test_unreadable_files(tmp_path: Path):
    for path in (tmp_path / "vanished.jpg", tmp_path, f"{tmp_path}/nul\0.jpg"):
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert caught.value.kind == "unreadable" and str(caught.value).startswith("unreadable: ")


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(ImageError("undecodable", "two\nlines")))
    assert (error.kind, error.message, str(error)) == ("undecodable", "two lines", "undecodable: two lines")


def _seeds() -> list[bytes]:
    picture, grey = photo_like(), photo_like().convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(picture, "JPEG", exif=exif),
        encode(grey, "JPEG", progressive=True),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "PNG"),
        encode(picture.quantize(16), "PNG", transparency=3),
        encode(picture, "WEBP"),
        encode(picture, "BMP"),
        encode(picture.quantize(16), "GIF"),
        encode(picture, "TIFF", compression="tiff_lzw"),
        encode(grey, "TIFF", compression="tiff_adobe_deflate"),
    ]


SEEDS = _seeds()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0.02, 1),
    header=st.booleans(),
)
def test_damaged_bytes_are_pictures_or_image_errors(seed, changes, keep, header):
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * (min(200, len(data)) if header else len(data)))] = value
    damaged = bytes(data[: max(1, int(keep * len(data)))])
    found = outcome(partial(decode_image, max_pixels=10**6), damaged)
    expected = outcome(partial(decode_image_reference, max_pixels=10**6), damaged)
    if isinstance(found, str) or isinstance(expected, str):
        assert isinstance(found, str) and isinstance(expected, str)
    else:
        assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00", b"BM"]),
)
def test_random_bytes_are_image_errors(body, magic):
    with pytest.raises(ImageError, match=r"^(undecodable|too_many_pixels): "):
        decode_image(magic + body, max_pixels=10**6)
