"""Reads one frame of a DICOM file, the first if no other is wanted.

Its size is checked by the headers before anything is unpacked. `dicom_display.py` turns the stored
values into the brightness that the file asks for.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from unimed_jax.config import ImageConfig
from unimed_jax.data import dicom_display
from unimed_jax.data.pixels import MOST_BYTES, SCANS, check_size, chosen_frame, grey, one_line
from unimed_jax.errors import UserError

EXTRA = "pip install 'unimed_jax[dicom]'"
_VALUES = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_JP2, _J2K = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"  # the first bytes of boxes, and of JPEG 2000 itself
_END = b"\xff\xd9"  # ends a frame as JPEG, JPEG-LS or JPEG 2000, but for a few bytes of padding
_GREY = ("MONOCHROME1", "MONOCHROME2")
_GROUPS = "PerFrameFunctionalGroupsSequence"
_OPEN = 0xFFFFFFFF  # length of a value that is cut in fragments
_RLE = "1.2.840.10008.1.2.5"
_GREY_16 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")  # JPEG 2000
_CODECS = ("pillow", "pydicom", "pylibjpeg", "pyjpegls")
_MANY = 1 << 30  # frames: so many that pydicom looks for a frame's own end instead of counting fragments
_MOST_UNPACKED = 1 << 28  # bytes of a deflated file
_PIECE = 1 << 14  # bytes that are unpacked at once, to at most a thousand times as many
_RUN = 64  # bytes that one byte of RLE unpacks to, at most
_ADVICE = "give a whole file with an image in it"


def read_dicom(file: BinaryIO, name: str, view: ImageConfig) -> np.ndarray:
    """Reads the frame of an open DICOM file that `view` names as uint8 [H, W, 3].

    `name` is what errors call the file. Stored values pass the modality rescale, then the window of
    `view` or else the first VOI table or window, by the frame's functional groups, the shared ones
    or the file (PS3.3 C.7.6.16, C.11.1, C.11.2); palettes and YBR become RGB. See `dicom_display`.
    Raises UserError for what cannot be read, is too large, has no such frame, is not in the units
    of a named window, or needs a codec that is not installed.
    """
    with _explained(name):
        return _read(file, name, view)


def read_header(file: BinaryIO, name: str, view: ImageConfig) -> tuple[int, tuple[int, int]]:
    """Reads the number of frames, and their (width, height), from a DICOM file's header.

    Raises UserError if the header cannot be read, or shows that `read_dicom` must fail on what
    `view` wants.
    """
    from pydicom import dcmread

    with _explained(name):
        data = dcmread(inflated(file, name), stop_before_pixels=True, force=True)
        frames = _frames(data)
        chosen_frame(view, frames, name)
        _window_of(data, view, str(data.get("PhotometricInterpretation")), name)
        width, height = int(data.get("Columns") or 0), int(data.get("Rows") or 0)
        samples, allocated = data.get("SamplesPerPixel") or 1, data.get("BitsAllocated") or 8
        check_size(name, height, width, samples * -(-allocated // 8))
        return frames, (width, height)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns whatever is raised inside into a UserError about the image `name`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pydicom raises what its many decoders and fields raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"image {name} cannot be read as DICOM ({reason}); {_ADVICE}.") from error


def _read(file: BinaryIO, name: str, view: ImageConfig) -> np.ndarray:
    from pydicom import dcmread

    file = inflated(file, name)
    data = dcmread(file, stop_before_pixels=True, force=True)
    little = bool(data.original_encoding[1])
    number = chosen_frame(view, _frames(data), name)
    stored, shown, bits = _frame(file, data, name, number)
    window = _window_of(data, view, shown, name)
    if groups := data.get(_GROUPS):  # that of the frame is all that is looked at from here on
        setattr(data, _GROUPS, groups[number : number + 1])
    if shown in _GREY:
        return grey(dicom_display.brightness(stored, data, shown == "MONOCHROME1", window))
    if shown == "PALETTE COLOR":
        return dicom_display.coloured(stored, data, little)
    if shown in ("RGB", "YBR_FULL", "YBR_FULL_422"):
        return dicom_display.rgb(stored, bits, ybr=shown != "RGB")
    raise UserError(
        f"image {name} has the colours {one_line(shown)}, which are not read; write it as RGB."
    )


def _frames(data) -> int:
    """Returns the number of frames that a file says it has, and 1 if it says nothing sensible."""
    with contextlib.suppress(Exception):
        return max(1, int(data.get("NumberOfFrames") or 1))
    return 1


def _window_of(data, view: ImageConfig, shown: str, name: str) -> tuple[float, float] | None:
    """Returns centre and width of the window that `view` asks for, or None if it asks for none.

    shown: the photometric interpretation. Raises UserError for a file that the window does not fit.
    """
    if view.window is None:
        return None
    if shown not in _GREY:
        raise UserError(
            f"image {name} has the colours {one_line(shown)}, which no window fits; leave out the "
            "source's image.window, or this image."
        )
    if not isinstance(view.window, str):
        return view.window
    if not dicom_display.hounsfield(data):
        raise UserError(
            f"image {name} is not CT with a rescale to Hounsfield units, which the window "
            f"{view.window!r} is in; give the source's image.window as (centre, width), or leave it out."
        )
    return dicom_display.WINDOWS[view.window]


# --------------------------------------------------------------------------------------------------
# From the file to the stored values of a frame
# --------------------------------------------------------------------------------------------------


def inflated(file: BinaryIO, name: str) -> BinaryIO:
    """Unpacks a file of the deflated transfer syntax, if its content is not too large.

    It returns other files as they are.
    """
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    start = 132 if file.read(132)[128:] == b"DICM" else 0
    file.seek(start)
    syntax = None
    if file.read(2) == b"\2\0":  # else it has no meta information
        file.seek(start)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        syntax = meta.get("TransferSyntaxUID")
    if syntax != DeflatedExplicitVRLittleEndian:
        file.seek(0)
        return file
    packed, unpack = file.read(), zlib.decompressobj(-zlib.MAX_WBITS)
    whole = io.BytesIO()
    # explicit, little endian
    whole.write(b"\0" * 128 + b"DICM\2\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0")
    for start in range(0, len(packed), _PIECE):
        whole.write(unpack.decompress(packed[start : start + _PIECE]))
        if whole.tell() > _MOST_UNPACKED:
            raise UserError(
                f"image {name} unpacks from {len(packed)} bytes to more than the "
                f"{_MOST_UNPACKED >> 20} MiB that are read; give a smaller file."
            )
    whole.seek(0)
    return whole


def _frame(file: BinaryIO, data, name: str, number: int) -> tuple[np.ndarray, str, int]:
    """Decodes a frame, by its number, of a file that is read up to where its pixels begin.

    Returns the stored values [H, W] or [H, W, 3], the photometric interpretation that they have,
    and the bits of one.
    """
    from pydicom import encaps
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import as_pixel_options

    little = bool(data.original_encoding[1])
    order = "<" if little else ">"
    head = file.read(8)
    implicit = data.original_encoding[0] or head[4:6] not in (b"OB", b"OW", b"OF", b"OD", b"UN")
    head += b"" if implicit else file.read(4)
    if len(head) < (8 if implicit else 12):
        raise UserError(f"image {name} cannot be read as DICOM (there are no pixels in it); {_ADVICE}.")
    group, element = struct.unpack_from(f"{order}HH", head)
    length = struct.unpack_from(f"{order}L", head, len(head) - 4)[0]

    # the first frame lies at the start, however many are said to follow
    frames = _frames(data)
    data.pop("NumberOfFrames", None)
    options: dict[str, Any] = as_pixel_options(data) | {
        "number_of_frames": 1,
        "pixel_keyword": _VALUES[group << 16 | element],
        "pixel_vr": "OW" if implicit else head[4:6].decode("latin-1"),
    }
    tables = options.pop("extended_offsets", None)
    if options.get("samples_per_pixel") == 3:
        options.setdefault("planar_configuration", 0)
    samples, allocated = options.get("samples_per_pixel") or 1, options.get("bits_allocated") or 8
    bits = options.get("bits_stored") or allocated
    rows, columns = options.get("rows") or 0, options.get("columns") or 0
    check_size(name, rows, columns, samples * -(-allocated // 8))

    syntax = _syntax(data, implicit, little)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(
            f"image {name} is {one_line(syntax.name)}, which is not read; write it in another syntax."
        ) from None
    if decoder.is_native and length == _OPEN:
        raise UserError(
            f"image {name} cannot be read as DICOM (its pixels do not lie as "
            f"{one_line(syntax.name)}); {_ADVICE}."
        )
    if decoder.is_native:
        codecs = [""]
        source = _native(
            file, length, options, rows * columns * samples * allocated, number, frames, name
        )
    else:
        frame = _encoded(file, tables, syntax, number, frames, name)
        bits = _check_frame(frame, syntax, (rows, columns), samples * allocated // 8, name) or bits
        codecs = _codecs(decoder, bits, samples, name)
        if samples == 3:
            # what the header says of planes holds for native pixels; other decoders than these say it
            options["planar_configuration"] = 0
        source = b"".join(encaps.itemize_frame(frame))
        source = b"\xfe\xff\0\xe0\0\0\0\0" + source  # an empty table of offsets
    # The bits that are used are the lowest, unless an old file says otherwise (PS3.5 8.1.1).
    high = data.get("HighBit") or 0
    shifted = (decoder.is_native or syntax == _RLE) and bits <= high < allocated <= 64
    if shifted:
        options["correct_unused_bits"] = False
    array, facts = _by_first(decoder, codecs, source, options)
    if shifted:
        array = array << (allocated - 1 - high) >> (allocated - bits)
    shown = str(facts["photometric_interpretation"])
    if (samples == 1) != (shown in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")):
        raise UserError(
            f"image {name} has {samples} samples a pixel and the colours {one_line(shown)}; {_ADVICE}."
        )
    return array, shown, bits


def _syntax(data, implicit: bool, little: bool):
    """Returns the transfer syntax of a file.

    A file that does not name it has that of its elements.
    """
    from pydicom import uid

    named = data.file_meta.get("TransferSyntaxUID")
    if named:
        return uid.UID(named)
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _native(
    file: BinaryIO,
    length: int,
    options: dict[str, Any],
    bits: int,
    number: int,
    frames: int,
    name: str,
) -> bytes:
    """Reads the bytes of an uncompressed frame, `bits` long in all, by its number of `frames`.

    It corrects the frame's colours in `options`.
    """
    start = file.tell()
    there = min(length, file.seek(0, io.SEEK_END) - start)
    if options.get("photometric_interpretation") == "YBR_FULL_422":
        # too much for colours at half the resolution: they are at the full one
        sizes = [-(-bits * count // 8) for count in (1, frames)]  # a file may make up its frames
        if there in (size + odd * (size % 2) for size in sizes for odd in (0, 1)):
            options["photometric_interpretation"] = "YBR_FULL"
        else:
            bits = bits // 3 * 2
    first = number * bits  # frames follow each other without a gap, even those of single bits
    need = -(-(first + bits) // 8)
    if there < need:
        raise UserError(f"image {name} is cut: its pixels have {there} of {need} bytes; {_ADVICE}.")
    file.seek(start + first // 8)
    data = file.read(need - first // 8 + need % 2)
    if not first % 8:
        return data
    packed = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return np.packbits(packed[first % 8 :][:bits], bitorder="little").tobytes() + b"\0"


def _encoded(
    file: BinaryIO, tables: tuple | None, syntax: str, number: int, frames: int, name: str
) -> bytes:
    """Reads the compressed bytes of a frame, of one fragment or several, by its number of `frames`."""
    from pydicom import encaps

    start = file.tell()
    if syntax == _RLE:  # a frame is one fragment (PS3.5 A.4.2), and has no mark at its end
        encaps.parse_basic_offsets(file)
        frames = encaps.parse_fragments(file)[0]
        file.seek(start)
    elif number == 0:  # it ends at its own end, whatever number of frames a file makes up
        frames = _MANY
    frame = encaps.get_frame(file, number, number_of_frames=frames, extended_offsets=tables)
    if not frame:
        raise UserError(f"image {name} cannot be read as DICOM (frame {number} is empty); {_ADVICE}.")
    # boxes that DICOM has no use for (PS3.5 A.4.4), and that pydicom may follow for ever
    if frame.startswith(_JP2):
        return frame[max(0, frame.find(_J2K)) :]
    return frame


def _check_frame(
    frame: bytes, syntax: str, size: tuple[int, int], bytes_a_pixel: int, name: str
) -> int | None:
    """Raises UserError if a compressed frame names another size than the file, or unpacks to more.

    Returns the bits of a sample that the frame's own header names, or None for RLE, which has no
    such header.
    """
    rows, columns = size
    if syntax == _RLE:
        need = rows * columns * bytes_a_pixel
        if need > _RUN * len(frame):
            raise UserError(
                f"image {name} is cut: {len(frame)} bytes of RLE cannot hold its {need}; {_ADVICE}."
            )
        if _RUN * len(frame) > MOST_BYTES and _unpacks_to_more(frame, 2 * need):
            raise UserError(f"image {name} unpacks to more than its {need} bytes; {_ADVICE}.")
        return None
    coded = _coded(frame)
    if coded is None or coded[:2] != size:
        says = f"{coded[1]} x {coded[0]}" if coded else "no size at all"
        raise UserError(
            f"image {name} is {columns} x {rows}, and its compressed pixels say {says}; {_ADVICE}."
        )
    if _END not in frame[-16:]:  # some decoders fill up what is missing
        raise UserError(f"image {name} is cut: its compressed pixels have no end; {_ADVICE}.")
    if frame.count(b"\xff\xda") > SCANS:
        raise UserError(f"image {name} has more than the {SCANS} scans that are read; save it again.")
    return coded[2]


def _unpacks_to_more(frame: bytes, most: int) -> bool:
    """Says whether the segments of an RLE frame (PS3.5 G.3) unpack to more than `most` bytes."""
    count = struct.unpack_from("<L", frame)[0]
    starts = struct.unpack_from(f"<{min(count, 15)}L", frame, 4)
    for start, stop in zip(starts, [*starts[1:], len(frame)], strict=True):
        at = start
        while at < min(stop, len(frame)) and most >= 0:
            code = frame[at]
            most -= code + 1 if code < 128 else 257 - code if code > 128 else 0
            at += code + 2 if code < 128 else 2 if code > 128 else 1
    return most < 0


def _coded(frame: bytes) -> tuple[int, int, int] | None:
    """Reads rows, columns and bits of a sample from a JPEG, JPEG-LS or JPEG 2000 header.

    Returns None if there is none.
    """
    if frame.startswith(_J2K) and len(frame) >= 43:  # ISO/IEC 15444-1 A.5.1
        width, height, left, top = struct.unpack_from(">4L", frame, 8)
        return height - top, width - left, (frame[42] & 0x7F) + 1
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 9 < len(frame) and frame[at] == 0xFF:  # ISO/IEC 10918-1 B.1.1
        mark = frame[at + 1]
        if mark == 0xF7 or (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)):
            return *struct.unpack_from(">HH", frame, at + 5), frame[at + 4]
        at += 1 if mark == 0xFF else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _codecs(decoder, bits: int, samples: int, name: str) -> list[str]:
    """Lists the installed codecs of a compression, those first that are always there.

    GDCM is never taken, since damaged files end its process. Raises UserError that says what to
    install for others.
    """
    syntax = decoder.UID
    deep = bits > (16 if samples == 1 and syntax in _GREY_16 else 8)
    installed = [
        one for one in _CODECS if one in decoder.available_plugins and not (deep and one == "pillow")
    ]
    if not installed:
        raise UserError(
            f"image {name} is compressed as {syntax.name} of {bits} bits, and no decoder for that "
            f"is installed; run {EXTRA}."
        )
    return installed


def _by_first(
    decoder, codecs: list[str], source: bytes, options: dict[str, Any]
) -> tuple[np.ndarray, dict]:
    """Decodes a frame by the first codec that can decode it.

    If none can, what the last one raised is raised.
    """
    for codec in codecs[:-1]:
        with contextlib.suppress(Exception):
            return decoder.as_array(source, index=0, raw=True, decoding_plugin=codec, **options)
    return decoder.as_array(source, index=0, raw=True, decoding_plugin=codecs[-1], **options)
