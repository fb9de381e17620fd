"""Every reader: what it returns, and that whatever is wrong with a file is a reject that names the
file and not its folder.
"""

import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.readers import decoding
from maskloom.data_prep.readers.common import (
    bright,
    decoded_image,
    eight_bit,
    files_in,
    natural_order,
    npy_array,
    portable_id,
    reject_as_error,
    require_same_size,
    shown_size,
    unreadable_as_reject,
    xml_root,
)
from maskloom.data_prep.readers.decoding import DecodedImage, decoded_picture
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# unreadable_as_reject and reject_as_error


def test_a_failure_becomes_a_reject_of_one_line_without_the_folder(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(RejectedSample) as caught, unreadable_as_reject(path):
        raise ValueError(f"{path}\nis broken at {path!r}")
    assert str(caught.value) == "a.bin cannot be decoded (a.bin is broken at PosixPath('a.bin'))"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_folder_behind_a_link_is_not_named_either(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = tmp_path / "link" / "a.bin"
    with (
        pytest.raises(RejectedSample, match=r"^a\.bin cannot be decoded \(a\.bin a\.bin\)$"),
        unreadable_as_reject(path),
    ):
        raise ValueError(f"{path} {path.resolve()}")


def test_a_link_to_itself_is_a_reject(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RejectedSample, match=r"^a\.png cannot be decoded"):
        decoded_image(tmp_path / "a.png")


def test_a_reason_is_cut_or_made_up(tmp_path):
    with pytest.raises(RejectedSample) as caught, unreadable_as_reject(tmp_path / "a"):
        raise ValueError("x" * 5000)
    assert len(str(caught.value)) < 250
    with pytest.raises(RejectedSample, match=r"\(MemoryError\)$"), unreadable_as_reject(tmp_path / "a"):
        raise MemoryError
    with (
        pytest.raises(RejectedSample, match=r"^a cannot be decoded \(no such file\)$"),
        unreadable_as_reject(tmp_path / "a"),
    ):
        (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("error", [RejectedSample("mine"), MaskLoomError("mine"), KeyboardInterrupt("mine")])
def test_what_is_no_decoding_failure_passes(tmp_path, error):
    with pytest.raises(type(error), match=r"^mine$"), unreadable_as_reject(tmp_path / "any"):
        raise error


def test_a_reject_becomes_an_error_with_the_whole_path_and_advice(tmp_path):
    path = tmp_path / "t.csv"
    with pytest.raises(MaskLoomError) as caught, reject_as_error(path, "do this"):
        raise RejectedSample("t.csv is bad")
    assert str(caught.value) == f"{path}: t.csv is bad; do this"
    with pytest.raises(ZeroDivisionError), reject_as_error(path, "do this"):
        raise ZeroDivisionError
    with reject_as_error(path, "do this"):
        pass


# decoded_image, eight_bit, bright


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.gif", "a.pgm", "a.webp", "a.jp2", "a.jpg"])
def test_images_are_decoded_whole(tmp_path, name):
    options = {"lossless": True} if name == "a.webp" else {}
    Image.fromarray(PIXELS).save(tmp_path / name, **options)
    image = decoded_image(tmp_path / name)
    (tmp_path / name).unlink()  # nothing is read later
    assert np.abs(eight_bit(image, "L").pixels.astype(int) - PIXELS).max() <= (8 if name == "a.jpg" else 0)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_of_a_known_format_is_rejected(tmp_path, content):
    path = written(tmp_path / "a.png", content)
    with pytest.raises(RejectedSample, match=r"^a\.png cannot be decoded \(.*a\.png") as caught:
        decoded_image(path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
def test_a_truncated_image_is_rejected(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    with pytest.raises(RejectedSample, match=rf"^{name} cannot be decoded"):
        decoded_image(written(tmp_path / name, data[: len(data) // 2]))


def test_a_missing_image_is_rejected(tmp_path):
    with pytest.raises(RejectedSample, match=r"^a\.png cannot be decoded \(no such file\)$"):
        decoded_image(tmp_path / "a.png")


def test_an_image_that_is_too_large_is_rejected_before_its_pixels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 11)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(RejectedSample, match=r"^a\.png has 4x3 pixels, more than 11$"):
        decoded_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pixels_of_eight_bits(mode):
    black_and_white = np.where(PIXELS > 100, 255, 0).astype(np.uint8)
    image = decoded_picture(Image.fromarray(black_and_white).convert(mode))
    grey, colour = eight_bit(image, "L").pixels, eight_bit(image, "RGB").pixels
    np.testing.assert_array_equal(grey, black_and_white)
    np.testing.assert_array_equal(colour, np.repeat(black_and_white[..., None], 3, axis=2))
    assert grey.dtype == colour.dtype == np.uint8


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deeper_pixels_are_not_cut(mode):
    image = decoded_picture(Image.new(mode, (4, 3), 300))
    for read in (lambda: eight_bit(image, "L"), lambda: bright(image)):
        with pytest.raises(
            RejectedSample, match=r"^the picture holds (uint16|int32|float32), expected 8 bits per channel$"
        ):
            read()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bright_masks_of_every_mode(mode):
    mask = bright(decoded_picture(Image.fromarray(np.where(PIXELS > 100, 255, 0).astype(np.uint8)).convert(mode)))
    np.testing.assert_array_equal(mask, PIXELS > 100)
    assert mask.dtype == np.uint8 and mask.max() == 1


def test_bright_thresholds_any_channel():
    pixels = np.zeros((1, 4, 3), np.uint8)
    pixels[0, 1, 0], pixels[0, 2, 2], pixels[0, 3, 1] = 255, 128, 127
    image = decoded_picture(Image.fromarray(pixels))
    assert bright(image).tolist() == [[0, 1, 1, 0]]
    assert bright(image, threshold=200).tolist() == [[0, 1, 0, 0]]


def test_bright_understands_zeros_and_ones_and_nothing():
    assert bright(decoded_picture(Image.fromarray(np.array([[0, 1]], np.uint8)))).tolist() == [[0, 1]]
    assert bright(decoded_picture(Image.new("L", (2, 1)))).tolist() == [[0, 0]]


def test_a_drawn_mask_that_is_nowhere_bright_is_not_taken_for_an_empty_one():
    pixels = np.array([[0, 100]], np.uint8)
    with pytest.raises(RejectedSample, match="values up to 100, none of them bright"):
        bright(DecodedImage(pixels))
    assert bright(DecodedImage(pixels // 4, lossy=True)).tolist() == [[0, 0]]  # what JPEG makes of black


@pytest.mark.parametrize("value", [1, 255])
def test_transparent_pixels_of_a_mask_are_background(value):
    pixels = np.full((1, 4), value, np.uint8)
    assert bright(DecodedImage(pixels, np.array([[0, 100, 155, 255]], np.uint8))).tolist() == [[0, 0, 1, 1]]
    # An overlay that was exported at two fifths of full opacity.
    assert bright(DecodedImage(pixels, np.array([[0, 20, 90, 102]], np.uint8))).tolist() == [[0, 0, 1, 1]]


def test_a_mask_that_is_black_on_transparent_is_rejected():
    with pytest.raises(RejectedSample, match="black on transparent"):
        bright(DecodedImage(np.array([[0, 255]], np.uint8), np.array([[255, 0]], np.uint8)))


def test_an_image_shows_its_transparency_on_black():
    image = DecodedImage(np.full((1, 3), 200, np.uint8), np.array([[255, 51, 0]], np.uint8))
    grey, darkened = eight_bit(image, "L")
    assert (grey.tolist(), darkened) == ([[200, 40, 0]], pytest.approx(2 / 3))


# npy_array


@pytest.mark.parametrize("dtype", ["bool", "i2", "u1", "f4", "f8"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_arrays_are_read(tmp_path, dtype, memory_map):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    got = npy_array(tmp_path / "a.npy", ndim=2, memory_map=memory_map)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype and isinstance(got, np.memmap) == memory_map


@pytest.mark.parametrize(
    ("array", "options", "says"),
    [
        (np.zeros((2, 3)), {"ndim": 3}, r"^a\.npy holds float64 of shape \(2, 3\), expected 3 axes of bool / integers"),
        (np.zeros((2, 3)), {"ndim": 2, "kinds": "ui"}, "expected 2 axes of unsigned integers / integers$"),
        (np.zeros((2, 3), complex), {"ndim": 2}, "holds complex128"),
        (np.array([["a"]]), {"ndim": 2}, "holds <U1"),
        (np.zeros((2, 2), [("x", "u1")]), {"ndim": 2}, "holds .*x"),
        (np.zeros((0, 3)), {"ndim": 2}, r"^a\.npy (holds float64 of shape \(0, 3\)|cannot be decoded)"),
    ],
)
def test_arrays_of_another_kind_are_rejected(tmp_path, array, options, says):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(RejectedSample, match=says):
        npy_array(tmp_path / "a.npy", **options)


class Payload:
    """Says so when it is unpickled."""

    opened = False

    def __reduce__(self):
        return setattr, (Payload, "opened", True)


def test_pickles_are_never_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Payload()]], dtype=object), allow_pickle=True)
    written(tmp_path / "b.npy", pickle.dumps(Payload()))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(RejectedSample, match="cannot be decoded"):
            npy_array(tmp_path / name, ndim=2)
    assert not Payload.opened


def test_an_array_that_claims_more_than_the_file_holds_is_rejected(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}".ljust(117) + b"\n"
    path = written(tmp_path / "a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    with pytest.raises(RejectedSample, match=r"^a\.npy cannot be decoded"):
        npy_array(path, ndim=2)


@pytest.mark.parametrize("keep", [0, 5, 60, 130])
def test_a_truncated_array_is_rejected(tmp_path, keep):
    np.save(tmp_path / "a.npy", np.ones((4, 4)))
    with pytest.raises(RejectedSample, match=r"^a\.npy cannot be decoded"):
        npy_array(written(tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()[:keep]), ndim=2)


# xml_root


def test_xml_is_read(tmp_path):
    root = xml_root(written(tmp_path / "a.xml", "<a><b c='1'>x</b></a>"))
    assert root.tag == "a" and root[0].attrib == {"c": "1"} and root[0].text == "x"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<a>",
        "text",
        '<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>',
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><a>&e;</a>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:1/a.dtd"><a/>',
        "<!DOCTYPE a><a/>",
    ],
)
def test_xml_that_is_broken_or_declares_anything_is_rejected(tmp_path, content):
    with pytest.raises(RejectedSample, match=r"^a\.xml cannot be decoded"):
        xml_root(written(tmp_path / "a.xml", content))


def test_xml_without_a_root_or_file_is_rejected(tmp_path, monkeypatch):
    with pytest.raises(RejectedSample, match=r"^a\.xml cannot be decoded \(no such file\)$"):
        xml_root(tmp_path / "a.xml")

    class Empty:
        def getroot(self):
            return None

    monkeypatch.setattr("defusedxml.ElementTree.parse", lambda *_, **__: Empty())
    with pytest.raises(RejectedSample, match=r"^a\.xml has no root element$"):
        xml_root(tmp_path / "a.xml")


# files_in, natural_order, portable_id, sizes


def test_files_are_listed_by_number_without_folders_and_hidden_ones_but_with_folders_named_as_images(tmp_path):
    for name in ("b (10).png", "b (2).png", "b (2).PNG", "b (002).png", ".hidden.png", "a.jpg", "٣.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name in ("folder", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "Thumbs.db").write_bytes(b"")
    names = [path.name for path in files_in(tmp_path)]
    assert names == ["٣.png", "a.jpg", "b (2).PNG", "b (002).png", "b (2).png", "b (10).png", "folder.png"]
    assert {path.name for path in files_in(tmp_path, (".jpg", ".png"))} == set(names)
    assert [path.name for path in files_in(tmp_path, (".jpg",))] == ["a.jpg"]
    assert files_in(tmp_path / "nowhere") == [] and files_in(tmp_path / "a.jpg") == []


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("1.png", "01.png", "001.png")]
    for path in paths:
        path.write_bytes(b"")
    kind = type(tmp_path)
    orders = []
    for listing in (paths, paths[::-1]):
        monkeypatch.setattr(kind, "iterdir", lambda self, listing=listing: iter(listing))
        orders.append([path.name for path in files_in(tmp_path)])
    assert orders[0] == orders[1] == ["001.png", "01.png", "1.png"]


def test_numbers_in_names_count_as_numbers(tmp_path):
    expected = ["9", "10", "x", "x2y9", "x2y10", "x10"]
    paths = [tmp_path / name for name in expected[::-1]]
    assert [path.name for path in sorted(paths, key=natural_order)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("benign (1)", "benign-1"),
        ("a_b.c-d", "a_b.c-d"),
        ("..x..", "x"),
        ("é à", "b337f964"),
        ("超音波 7", "7-289e2f79"),
        ("e\u0301 a\u0300", "b337f964"),
        ("Mü", "M-84fb2088"),
        ("Mö", "M-4815c7d5"),
        ("a/../b", "a-..-b"),
    ],
)
def test_portable_ids(text, expected):
    assert portable_id(text) == expected


def test_sizes_are_shown_and_compared():
    assert shown_size(np.zeros((2, 3, 4))) == "3x2"
    require_same_size("mask", np.zeros((2, 3)), np.zeros((2, 3, 3)))
    with pytest.raises(RejectedSample, match=r"^mask m is 3x2, the image 2x3 \(width x height\)$"):
        require_same_size("mask m", np.zeros((2, 3)), np.zeros((3, 2)))
