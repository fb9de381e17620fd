"""Decodes compressed DICOM frames for pydicom by imagecodecs: JPEG of 12 bits, lossless JPEG and JPEG-LS.

With Pillow alone pydicom decodes JPEG of 8 bits and JPEG 2000. Of the plug-ins that it knows for the others, those for JPEG of 12 bits are under the GPL.
"""

import struct
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner

CODECS = {
    JPEGExtended12Bit: "jpeg8_decode",
    JPEGLossless: "ljpeg_decode",
    JPEGLosslessSV1: "ljpeg_decode",
    JPEGLSLossless: "jpegls_decode",
    JPEGLSNearLossless: "jpegls_decode",
}
DECODER_DEPENDENCIES = dict.fromkeys(CODECS, ("numpy", "imagecodecs"))
# Markers of a JPEG that begin with its size: every SOF, and that of JPEG-LS.
FRAME_MARKERS = (*(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)), 0xF7)


@cache
def register() -> None:
    """Give pydicom's decoders this one as well; those that they have come first."""
    from pydicom.pixels import get_decoder

    for syntax in CODECS:
        get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))


def is_available(syntax: str) -> bool:
    """Whether this decodes a transfer syntax."""
    return syntax in CODECS


def decode_frame(src: bytes, runner: "DecodeRunner") -> bytes:
    """Return the values of one frame, colours pixel by pixel and as they are stored.

    Args:
        src: the compressed frame.
        runner: what pydicom knows of the frame; it is told how many bits the values have.

    Raises:
        ValueError: the frame has another size than the header of the file says.
    """
    import imagecodecs

    if jpeg_size(src) != (runner.rows, runner.columns):
        raise ValueError("the compressed frame has another size than the file's header says")
    # What the header says of colours is pydicom's to apply.
    stored = {"colorspace": "RGB", "outcolorspace": "RGB"} if runner.samples_per_pixel > 1 else {}
    codec = CODECS[runner.transfer_syntax]
    pixels = getattr(imagecodecs, codec)(src, **(stored if codec == "jpeg8_decode" else {}))
    bits = pixels.dtype.itemsize * 8
    if runner.pixel_representation == 1 and runner.bits_stored < bits:  # the sign is the highest of the stored bits
        unused = bits - runner.bits_stored
        pixels = (pixels << unused).view(f"i{pixels.dtype.itemsize}") >> unused
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", bits)
    return np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) as a JPEG or JPEG-LS states it, or None where it does not."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        if data[place + 1] in FRAME_MARKERS:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return height, width
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return None
