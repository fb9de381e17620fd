"""Every kind of image file comes out as the array that was written, or is rejected.

Whatever Pillow would reduce, invert or cut is not.
"""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskloom.data_prep.processing.label_maps import binary_mask, class_mask, label_map
from maskloom.data_prep.readers import decoding
from maskloom.data_prep.readers.common import decoded_image
from maskloom.data_prep.readers.decoding import decode
from maskloom.data_prep.readers.image_files import decoded_mask, image_pixels
from maskloom.pipeline.errors import RejectedSample

SHAPE = (24, 31)
BLOB = np.zeros(SHAPE, np.uint8)
BLOB[6:15, 9:22] = 1
DEPTHS = {np.dtype(np.uint8): 8, np.dtype(np.uint16): 16}


def values(dtype, channels=1):
    """Return noise over the whole range of a type, (H, W) or (H, W, channels)."""
    random = np.random.default_rng(0)
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    if np.dtype(dtype).kind == "f":
        return random.normal(0, 1000, shape).astype(dtype)
    return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, pixels, *extra):
    """Write a PNG of 8 or 16 bits per channel; `extra` are further chunks."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, DEPTHS[pixels.dtype], colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    chunks = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(decoding.PNG_MAGIC + b"".join(chunks))
    return path


def write_tiff(path, pixels, **options):
    if "photometric" not in options:
        options["photometric"] = "rgb" if pixels.ndim == 3 and pixels.shape[2] > 2 else "minisblack"
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        options.setdefault("extrasamples", ["unassalpha"])
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(path, pixels, **options)
    return path


def shown(pixels):
    """Return what an array with or without an alpha channel shows on black."""
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., -1:] / (np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1)
    colours = pixels[..., :-1] * alpha
    return (colours if pixels.dtype.kind == "f" else np.rint(colours)).astype(pixels.dtype).squeeze()


# Images: {PNG, TIFF} x {L, LA, RGB, RGBA} x {8, 16 bits, float}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_images_keep_their_depth(tmp_path, dtype, channels):
    pixels = values(dtype, channels)
    got = image_pixels(write_png(tmp_path / "a.png", pixels))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, shown(pixels))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_tiff_images_keep_their_depth(tmp_path, dtype, channels, byteorder):
    pixels = values(dtype, channels)
    if channels == 4:
        top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
        pixels[..., 3] = np.linspace(0, top, SHAPE[1]).astype(dtype)
    got = image_pixels(write_tiff(tmp_path / "a.tif", pixels, byteorder=byteorder))
    assert got.dtype == dtype and got.dtype.isnative
    expected = shown(pixels) if np.dtype(dtype).kind != "i" or channels < 4 else None
    if expected is not None:
        np.testing.assert_array_equal(got, expected)


def test_tiff_of_half_floats(tmp_path):
    pixels = values(np.float32).astype(np.float16)
    got = image_pixels(write_tiff(tmp_path / "a.tif", pixels))
    assert got.dtype == np.float32  # of which resampling can do with
    np.testing.assert_array_equal(got, pixels)


LAYOUTS = [
    {"compression": "lzw"},
    {"compression": "deflate", "predictor": True},
    {"compression": "packbits"},
    {"compression": "zstd"},
    {"tile": (16, 16)},
    {"tile": (16, 16), "compression": "lzw", "predictor": True},
    {"bigtiff": True},
    {"rowsperstrip": 5},
    {"planarconfig": "separate"},
    {"planarconfig": "separate", "compression": "deflate"},
    {"planarconfig": "separate", "tile": (16, 16), "byteorder": ">"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_layouts_and_compressions(tmp_path, layout, dtype, channels):
    pixels = values(dtype, channels)
    if channels == 1:  # has no planes
        layout = {key: value for key, value in layout.items() if key != "planarconfig"}
    path = write_tiff(tmp_path / "a.tif", pixels, **layout)
    np.testing.assert_array_equal(image_pixels(path), shown(pixels))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [2, 4])
def test_colours_that_are_multiplied_by_their_alpha_are_so_once(tmp_path, dtype, channels):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = np.full((*SHAPE, channels), top, np.float64)
    pixels[...] *= np.linspace(0, 1, SHAPE[1])[None, :, None]
    path = write_tiff(tmp_path / "a.tif", pixels.astype(dtype), extrasamples=["assocalpha"])
    np.testing.assert_allclose(image_pixels(path), pixels.astype(dtype)[..., :-1].squeeze(), atol=top * 2e-7)
    assert (decode(path).pixels[:, 1:] == top).mean() > 0.9  # white throughout


def test_lossy_tiff_is_known_as_lossy(tmp_path):
    path = write_tiff(tmp_path / "a.tif", BLOB * np.uint8(255), compression="jpeg")
    decoded = decode(path)
    assert decoded.lossy
    assert np.abs(decoded.pixels.astype(int) - BLOB * 255).max() < 60
    assert not decode(write_tiff(tmp_path / "b.tif", BLOB)).lossy


def test_twelve_bits_in_sixteen_keep_their_values(tmp_path):
    pixels = (values(np.uint16) >> 4).astype(np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", bitspersample=12)
    np.testing.assert_array_equal(image_pixels(path), pixels)


# White is zero


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_white_is_zero_at_every_depth(tmp_path, dtype, compression):
    pixels = values(dtype)
    path = write_tiff(tmp_path / "a.tif", pixels, photometric="miniswhite", compression=compression)
    np.testing.assert_array_equal(image_pixels(path), np.iinfo(dtype).max - pixels)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_white_is_zero_of_values_without_a_fixed_white_keeps_their_range(tmp_path, dtype):
    pixels = (values(np.int16) // 2).astype(dtype)
    got = image_pixels(write_tiff(tmp_path / "a.tif", pixels, photometric="miniswhite"))
    assert got.dtype == dtype and (got.min(), got.max()) == (pixels.min(), pixels.max())
    np.testing.assert_array_equal(np.argsort(got, axis=None)[[0, -1]], np.argsort(pixels, axis=None)[[-1, 0]])


def test_white_is_zero_of_one_bit(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", BLOB.astype(bool), photometric="miniswhite")
    np.testing.assert_array_equal(image_pixels(tmp_path / "a.tif"), (1 - BLOB) * 255)


def packed_tiff(path, pixels, bits):
    """Write an uncompressed TIFF of 2 or 4 bits whose zero is white."""
    height, width = pixels.shape
    lines = b""
    for row in pixels:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        lines += bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0), (273, 122), (277, 1), (278, height)]
    tags.append((279, len(lines)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + lines)


@pytest.mark.parametrize("bits", [2, 4])
def test_white_is_zero_of_few_bits(tmp_path, bits):
    pixels = values(np.uint8) % 2**bits
    packed_tiff(tmp_path / "a.tif", pixels, bits)
    np.testing.assert_array_equal(image_pixels(tmp_path / "a.tif"), 255 - pixels * (255 // (2**bits - 1)))


# Masks


def read_binary(path):
    mask = decoded_mask(path, coloured=True)
    return binary_mask(mask.values, path.name, mask.lossy, mask.transparent)


@pytest.mark.parametrize("write", [write_png, write_tiff])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "on"), [(np.uint8, 1), (np.uint8, 255), *((np.uint16, on) for on in (1, 255, 65535))]
)
def test_masks_of_every_depth_are_read_by_their_values(tmp_path, write, channels, dtype, on):
    mask = BLOB.astype(dtype) * dtype(on)
    pixels = mask if channels == 1 else np.repeat(mask[..., None], channels, axis=2)
    if channels in (2, 4):
        pixels[..., -1] = np.iinfo(dtype).max  # the same everywhere: it tells nothing
    np.testing.assert_array_equal(read_binary(write(tmp_path / "a.x", pixels)), BLOB)


@pytest.mark.parametrize("write", [write_png, write_tiff])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("opaque", [1, 0.4])
def test_a_mask_may_be_drawn_in_the_alpha_channel(tmp_path, write, dtype, channels, opaque):
    top = np.iinfo(dtype).max
    pixels = np.full((*SHAPE, channels), top, dtype)
    pixels[..., -1] = np.where(BLOB, int(top * opaque), 0)
    path = write(tmp_path / "a.x", pixels)
    np.testing.assert_array_equal(read_binary(path), BLOB)
    pixels[..., :-1] = 0  # a black lesion on nothing
    with pytest.raises(RejectedSample, match="black on transparent"):
        read_binary(write(path, pixels))


def test_a_transparent_colour_counts_at_every_depth(tmp_path):
    hidden = chunk(b"tRNS", struct.pack(">H", 0))
    for dtype in (np.uint8, np.uint16):
        path = write_png(tmp_path / "a.png", BLOB.astype(dtype) * dtype(255), hidden)
        np.testing.assert_array_equal(read_binary(path), BLOB)
        np.testing.assert_array_equal(decoded_mask(path, False).transparent, BLOB == 0)
    white = chunk(b"tRNS", struct.pack(">3H", 255, 255, 255))
    path = write_png(tmp_path / "b.png", np.repeat(((1 - BLOB) * np.uint8(255))[..., None], 3, axis=2), white)
    with pytest.raises(RejectedSample, match="black on transparent"):  # the white that is left out may be either
        read_binary(path)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(tmp_path, bits):
    top = 2**bits - 1
    lines = b""
    for row in BLOB * top:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        lines += b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *SHAPE[::-1], bits, 0, 0, 0, 0))
    for hidden, expected in ((0, BLOB), (top, None)):
        chunks = head + chunk(b"tRNS", struct.pack(">H", hidden)) + chunk(b"IDAT", zlib.compress(lines))
        (tmp_path / "a.png").write_bytes(decoding.PNG_MAGIC + chunks + chunk(b"IEND", b""))
        if expected is None:
            with pytest.raises(RejectedSample, match="black on transparent"):
                read_binary(tmp_path / "a.png")
        else:
            np.testing.assert_array_equal(read_binary(tmp_path / "a.png"), expected)


def test_nothing_is_printed_about_odd_files(tmp_path, recwarn):
    read_binary(palette_mask(tmp_path / "a.png", transparency=bytes([0, 255, 255])))
    assert not recwarn.list


def palette_mask(path, **options):
    image = Image.fromarray(BLOB * 2, "P")
    image.putpalette([255, 255, 255, 10, 10, 10, 255, 0, 0])
    image.save(path, **options)
    return path


def test_palettes_have_indices_colours_and_transparency(tmp_path):
    path = palette_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded_mask(path, coloured=False).values, BLOB * 2)
    assert decoded_mask(path, coloured=True).values[0, 0].tolist() == [255, 255, 255]
    path = palette_mask(tmp_path / "b.png", transparency=0)  # the background's white does not show
    np.testing.assert_array_equal(read_binary(path), BLOB)


def test_transparent_pixels_are_background_whatever_value_they_have(tmp_path):
    classes = label_map({0: "liver", 200: "background"})
    pixels = np.stack([np.zeros(SHAPE, np.uint8), BLOB * 255], axis=-1)
    mask = decoded_mask(write_png(tmp_path / "a.png", pixels), coloured=False)
    np.testing.assert_array_equal(class_mask(mask.values, classes, "a.png", mask.transparent), BLOB)
    with pytest.raises(RejectedSample, match="black on transparent"):
        class_mask(mask.values, label_map({1: "liver", 0: "background"}), "a.png", mask.transparent)


@pytest.mark.parametrize("factor", [1, 257])
def test_colours_of_16_bits_stand_for_those_of_8(tmp_path, factor):
    colours = np.zeros((*SHAPE, 3), np.uint16)
    colours[BLOB == 1] = np.array([255, 128, 0], np.uint16) * factor
    mask = decoded_mask(write_png(tmp_path / "a.png", colours), coloured=True)
    classes = label_map({"#000000": "background", "#ff8000": "polyp"})
    np.testing.assert_array_equal(class_mask(mask.values, classes, "a.png"), BLOB)
    with pytest.raises(RejectedSample, match="names 8-bit colours"):
        class_mask(mask.values + np.uint16(1) * 256, classes, "a.png")


def test_several_colours_of_16_bits_are_no_binary_mask(tmp_path):
    colours = np.zeros((*SHAPE, 3), np.uint16)
    colours[:5, :, 0], colours[9:, :, 1] = 65535, 65535
    with pytest.raises(RejectedSample, match="several colours"):
        read_binary(write_png(tmp_path / "a.png", colours))


# Rejects


def rejected(path, reason):
    with pytest.raises(RejectedSample, match=reason) as caught:
        decoded_image(path)
    assert str(path.parent) not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (values(np.uint16, 5), {"photometric": "minisblack"}, "5 channel"),
        (values(np.uint16, 4), {"photometric": "separated"}, "as SEPARATED; grey and RGB are read"),
        (values(np.uint16, 3), {"photometric": "cielab"}, "as CIELAB"),
        (values(np.float32).astype(np.complex64), {}, "complex64"),
        (values(np.uint16, 4), {"extrasamples": ["unspecified"]}, "does not say that the last is transparency"),
        (values(np.uint8, 4), {"extrasamples": ["unspecified"]}, "does not say that the last is transparency"),
        (values(np.uint8, 2), {"photometric": "minisblack"}, "does not say that the last is transparency"),
        (values(np.uint8, 5), {}, r"has 5 channel\(s\) of uint8 as RGB"),
    ],
)
def test_tiff_files_that_are_not_understood(tmp_path, pixels, options, reason):
    layout = {"photometric": "rgb", "planarconfig": "contig"} if pixels.ndim == 3 else {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **layout | options)
    rejected(tmp_path / "a.tif", reason)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("metadata", [{"imagej": True}, {"metadata": {"axes": "ZYX"}}, {"ome": True}])
def test_stacks_are_rejected_however_they_are_stored(tmp_path, dtype, metadata):
    stack = np.stack([values(dtype)] * 3)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **metadata)
    rejected(tmp_path / "a.tif", "has 3 pages")
    if "imagej" in metadata:  # all planes behind one page, as ImageJ stores what is larger than 4 GB
        tifffile.imwrite(tmp_path / "b.tif", stack, photometric="minisblack", truncate=True, **metadata)
        rejected(tmp_path / "b.tif", "has 3 pages")


def test_an_ome_tiff_is_its_own_page_whatever_other_files_it_names(tmp_path):
    stack = np.stack([values(np.uint16)] * 2)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack[0], photometric="minisblack", ome=True)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        xml = file.ome_metadata
    planes = "".join(
        f'<TiffData FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for z, name in enumerate(("a.tif", "b.tif"))
    )
    xml = re.sub(r"<TiffData.*?/>", planes, xml, flags=re.DOTALL).replace('SizeZ="1"', 'SizeZ="2"')
    assert planes in xml and 'SizeZ="2"' in xml
    for name, plane in zip(("a.tif", "b.tif"), stack, strict=True):
        tifffile.imwrite(tmp_path / name, plane, photometric="minisblack", description=xml, metadata=None)
    np.testing.assert_array_equal(image_pixels(tmp_path / "a.tif"), stack[0])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_rejected(tmp_path, name):
    frames = [Image.fromarray(values(np.uint8) // (index + 1)) for index in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    rejected(tmp_path / name, "has 3 pages")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "deep.tif"])
def test_turned_pictures_are_rejected_or_turned(tmp_path, name):
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 6
    path = tmp_path / name
    if name == "deep.tif":
        tifffile.imwrite(path, values(np.uint16), extratags=[(274, "H", 1, 6, True)])
    else:
        Image.fromarray(BLOB * 255).save(path, exif=exif)
    rejected(path, "is stored turned")
    if not name.endswith(".tif"):
        assert decoded_image(path, turn=True).pixels.shape[:2] == SHAPE[::-1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("layout", [{}, {"compression": "lzw"}, {"tile": (16, 16), "compression": "deflate"}], ids=str)
def test_truncated_tiff_files_are_rejected(tmp_path, dtype, layout):
    path = write_tiff(tmp_path / "a.tif", values(dtype), **layout)
    data = path.read_bytes()
    for keep in (1, 8, len(data) // 3, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:keep])
        rejected(path, r"^a\.tif")


def test_a_part_that_was_never_written_is_rejected(tmp_path):
    path = write_tiff(tmp_path / "a.tif", values(np.uint16), rowsperstrip=8)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = list(file.pages.first.databytecounts)
        file.pages.first.tags["StripByteCounts"].overwrite([0, *counts[1:]])
    rejected(path, "cut short")


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16), "compression": "deflate"}, {"rowsperstrip": 8}], ids=str)
def test_a_height_beyond_what_is_stored_is_rejected(tmp_path, layout):
    path = write_tiff(tmp_path / "a.tif", values(np.uint16), **layout)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags["ImageLength"].overwrite(60_000)
    rejected(path, r"^a\.tif")


@pytest.mark.parametrize("channels", [1, 3])
def test_truncated_png_of_16_bits_is_rejected(tmp_path, channels):
    path = write_png(tmp_path / "a.png", values(np.uint16, channels))
    data = path.read_bytes()
    for keep in (30, len(data) // 2, len(data) - 20):
        path.write_bytes(data[:keep])
        rejected(path, r"^a\.png")


def test_deep_files_that_claim_too_much_are_rejected_before_anything_is_allocated(tmp_path, monkeypatch):
    png, tiff = (
        write_png(tmp_path / "a.png", values(np.uint16, 3)),
        write_tiff(tmp_path / "a.tif", values(np.uint16, 3)),
    )
    monkeypatch.setattr(decoding, "MAX_PIXELS", SHAPE[0] * SHAPE[1] * 2)
    rejected(png, r"31x24 pixels of 16 bits, too many")
    rejected(tiff, r"31x24 pixels of 3 channel\(s\), too many")


def test_other_formats_of_more_than_8_bits_are_not_reduced(tmp_path):
    deep = values(np.uint16, 3)
    (tmp_path / "a.png").write_bytes(b"P6 31 24 65535\n" + deep.astype(">u2").tobytes())
    rejected(tmp_path / "a.png", "more than 8 bits per channel, which are not read from PPM")
    (tmp_path / "b.png").write_bytes(b"P6 31 24 255\n" + values(np.uint8, 3).tobytes())
    np.testing.assert_array_equal(image_pixels(tmp_path / "b.png"), values(np.uint8, 3))
    import imagecodecs

    (tmp_path / "c.png").write_bytes(imagecodecs.jpeg2k_encode(deep, level=0))
    rejected(tmp_path / "c.png", "more than 8 bits per channel, which are not read from JPEG2000")
    (tmp_path / "d.png").write_bytes(imagecodecs.jpeg2k_encode(values(np.uint8, 3), level=0))
    np.testing.assert_array_equal(image_pixels(tmp_path / "d.png"), values(np.uint8, 3))


def test_other_colour_spaces_are_converted_or_rejected(tmp_path):
    colours = np.zeros((*SHAPE, 3), np.uint8)
    colours[...] = 200, 40, 90
    for mode in ("CMYK", "YCbCr"):
        for name in ("a.jpg", "a.tif"):
            Image.fromarray(colours).convert(mode).save(tmp_path / name)
            assert np.abs(image_pixels(tmp_path / name).astype(int) - colours).max() <= 6, (mode, name)
    tifffile.imwrite(tmp_path / "lab.tif", colours, photometric="cielab")
    rejected(tmp_path / "lab.tif", "mode LAB, which is not read")


def test_a_lossless_picture_under_the_name_of_a_jpeg_and_the_reverse(tmp_path):
    blurred = io.BytesIO()
    Image.fromarray(BLOB * 255).save(blurred, "JPEG", quality=60)
    (tmp_path / "a.png").write_bytes(blurred.getvalue())
    assert decoded_mask(tmp_path / "a.png", True).lossy
    assert (read_binary(tmp_path / "a.png") != BLOB).mean() < 0.02
    with pytest.raises(RejectedSample, match="mask_values does not name"):
        class_mask(decoded_mask(tmp_path / "a.png", False).values, label_map({0: "background", 255: "x"}), "a.png")


def test_an_alpha_channel_beyond_its_range(tmp_path):
    pixels = values(np.float32, 4)
    rejected_path = write_tiff(tmp_path / "a.tif", pixels)
    with pytest.raises(RejectedSample, match="alpha channel has values beyond"):
        image_pixels(rejected_path)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_of_one_row_or_column(tmp_path, shape, dtype):
    pixels = np.arange(shape[0] * shape[1], dtype=dtype).reshape(shape)
    np.testing.assert_array_equal(image_pixels(write_png(tmp_path / "a.png", pixels)), pixels)
    np.testing.assert_array_equal(image_pixels(write_tiff(tmp_path / "a.tif", pixels)), pixels)


def test_a_picture_without_pixels_is_rejected(tmp_path):
    empty = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 16, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(decoding.PNG_MAGIC + empty)
    rejected(tmp_path / "a.png", r"^a\.png")
