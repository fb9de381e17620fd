"""A pydicom decoder plug-in on imagecodecs for 12-bit JPEG, lossless JPEG and JPEG-LS.

With Pillow alone, pydicom decodes 8-bit JPEG and JPEG 2000. Its other plug-ins for 12-bit JPEG are
under the GPL.
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
# pydicom reads this by its name in `add_plugin`.
DECODER_DEPENDENCIES = dict.fromkeys(CODECS, ("numpy", "imagecodecs"))
# JPEG markers that start a frame header with its size: all SOF markers and that of JPEG-LS.
FRAME_MARKERS = (*(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)), 0xF7)


@cache
def register() -> None:
    """Register this decoder with pydicom; decoders that are already registered take precedence."""
    from pydicom.pixels import get_decoder

    for syntax in CODECS:
        get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))


def is_available(syntax: str) -> bool:
    """Whether this plug-in decodes a transfer syntax."""
    return syntax in CODECS


def decode_frame(src: bytes, runner: "DecodeRunner") -> bytes:
    """Return the values of one frame, interleaved by pixel, in the stored colour space.

    Args:
        src: the compressed frame.
        runner: pydicom's description of the frame; its `bits_allocated` is updated.

    Raises:
        ValueError: the size of the frame differs from the header of the file.
    """
    import imagecodecs

    if jpeg_size(src) != (runner.rows, runner.columns):
        raise ValueError("the compressed frame has another size than the file's header says")
    # pydicom converts colours according to the header.
    stored = {"colorspace": "RGB", "outcolorspace": "RGB"} if runner.samples_per_pixel > 1 else {}
    codec = CODECS[runner.transfer_syntax]
    pixels = getattr(imagecodecs, codec)(src, **(stored if codec == "jpeg8_decode" else {}))
    bits = pixels.dtype.itemsize * 8
    if (
        runner.pixel_representation == 1 and runner.bits_stored < bits
    ):  # sign extension: the sign is the highest stored bit
        unused = bits - runner.bits_stored
        pixels = (pixels << unused).view(f"i{pixels.dtype.itemsize}") >> unused
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", bits)
    return np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) stated in a JPEG or JPEG-LS stream, or None."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        if data[place + 1] in FRAME_MARKERS:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return height, width
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return None
