"""Every compression of DICOM that pydicom's own examples use is read, or its reason names the
compression.
"""

import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import data_manager
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

from maskloom.data_prep.readers.dicom import is_dicom, read_header, read_picture
from maskloom.data_prep.readers.dicom_codecs import jpeg_size
from maskloom.pipeline.errors import RejectedSample
from tests.writers.dicom_folder import dataset, save

GREY = np.random.default_rng(0).integers(0, 4096, (48, 48), dtype=np.uint16)
SMOOTH = (np.add.outer(np.arange(48), np.arange(48)) * 40).astype(np.uint16)
NO_WINDOW = {"WindowCenter": None, "WindowWidth": None, "RescaleSlope": None, "RescaleIntercept": None}


def example(name):
    return next(path for path in Path(data_manager.DATA_ROOT).rglob(name))


def compressed(pixels, syntax, frame, **tags):
    made = dataset(pixels=pixels, TransferSyntaxUID=syntax, **NO_WINDOW | tags)
    made.PixelData = encapsulate([frame])
    made["PixelData"].is_undefined_length = True
    return made


def read(path, made):
    save(path, made)
    read_header(path)
    return read_picture(path, 0, None).image


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (JPEGLossless, imagecodecs.ljpeg_encode),
        (JPEGLosslessSV1, imagecodecs.ljpeg_encode),
        (JPEGLSLossless, imagecodecs.jpegls_encode),
        (JPEGLSNearLossless, imagecodecs.jpegls_encode),
    ],
)
@pytest.mark.parametrize("pixels", [GREY, GREY * np.uint16(16), (GREY >> 4).astype(np.uint8)])
def test_grey_of_every_depth_comes_back(tmp_path, syntax, encode, pixels):
    np.testing.assert_array_equal(read(tmp_path / "a.dcm", compressed(pixels, syntax, encode(pixels))), pixels)


def test_signed_values_of_12_bits(tmp_path):
    signed = GREY.astype(np.int16) - 2048
    frame = imagecodecs.jpegls_encode((signed & 4095).astype(np.uint16))
    made = compressed(signed, JPEGLSLossless, frame, BitsStored=12, HighBit=11, PixelRepresentation=1)
    np.testing.assert_array_equal(read(tmp_path / "a.dcm", made), signed)


def test_jpeg_of_12_bits(tmp_path):
    frame = imagecodecs.jpeg8_encode(SMOOTH, level=98, bitspersample=12)
    image = read(tmp_path / "a.dcm", compressed(SMOOTH, JPEGExtended12Bit, frame, BitsStored=12, HighBit=11))
    assert np.abs(image - SMOOTH).max() < 40 and image.max() > 3000


def test_colours(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    made = compressed(colours, JPEGLSLossless, imagecodecs.jpegls_encode(colours))
    np.testing.assert_array_equal(read(tmp_path / "a.dcm", made), colours)


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, JPEGLSLossless, JPEGLosslessSV1])
def test_a_frame_of_another_size_or_damaged_is_rejected_by_its_compression(tmp_path, syntax):
    encode = {JPEGExtended12Bit: lambda p: imagecodecs.jpeg8_encode(p, bitspersample=12)}.get(
        syntax, imagecodecs.jpegls_encode if syntax == JPEGLSLossless else imagecodecs.ljpeg_encode
    )
    larger = encode(np.zeros((96, 48), np.uint16))
    for frame in (larger, encode(SMOOTH)[:40], b"\xff\xd8\xff\xd9"):
        with pytest.raises(RejectedSample, match=r"stored as JPEG.* with 12 bits, cannot be decoded"):
            read(tmp_path / "a.dcm", compressed(SMOOTH, syntax, frame, BitsStored=12, HighBit=11))


def test_a_frame_of_another_size_is_not_decoded(tmp_path, monkeypatch):
    made = compressed(SMOOTH, JPEGLSLossless, imagecodecs.jpegls_encode(np.zeros((96, 48), np.uint16)))
    decoded = []
    monkeypatch.setattr(imagecodecs, "jpegls_decode", decoded.append)
    with pytest.raises(RejectedSample, match="cannot be decoded"):
        read(tmp_path / "a.dcm", made)
    assert not decoded


def test_the_size_is_read_off_a_jpeg():
    assert jpeg_size(imagecodecs.jpegls_encode(GREY[:7])) == (7, 48)
    assert jpeg_size(imagecodecs.jpeg8_encode(np.zeros((5, 9), np.uint8))) == (5, 9)
    assert jpeg_size(b"\xff\xd8\xff\xd9") is None


def test_jpeg_extended_of_pydicoms_examples_shows_what_the_other_copy_shows():
    shown = read_picture(example("JPGExtended.dcm"), 0, None)
    other = read_picture(example("JPEG2000.dcm"), 0, None)
    assert shown.image.shape == other.image.shape == (1024, 256)
    assert np.corrcoef(shown.image.ravel(), other.image.ravel())[0, 1] > 0.95


def test_every_example_of_pydicom_is_read_or_its_reason_says_why():
    """No reason is the bare name of an exception if the compression is not understood."""
    read_files, reasons = 0, {}
    for path in sorted(p for p in Path(data_manager.DATA_ROOT).rglob("*") if p.is_file() and is_dicom(p)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_header(path)
                read_picture(path, 0, None)
                read_files += 1
            except RejectedSample as error:
                reasons[path.name] = str(error)
    assert read_files >= 60
    undecoded = {name: why for name, why in reasons.items() if "cannot be decoded" in why}
    assert all("stored as JPEG" in why for why in undecoded.values()), undecoded
    assert not any("decoder that is not installed" in why for why in reasons.values())
    assert {pydicom.dcmread(example(name)).file_meta.TransferSyntaxUID.is_compressed for name in undecoded} <= {True}
