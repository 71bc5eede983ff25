"""Writes small PNG and TIFF files of kinds that Pillow does not write."""

import struct
import zlib


def tiff(
    data: bytes,
    bits: int,
    form: int = 1,
    photometric: int = 1,
    order: str = "<",
    samples: int = 1,
    planes: bool = False,
    extra: int | None = None,
) -> bytes:
    """Writes a TIFF of 4 rows and 6 columns; form: 1 unsigned, 2 signed, 3 float.

    planes: the samples of `data` lie one after the other; extra: the meaning of the last sample, 1
    alpha that is multiplied into the others, 2 alpha.
    """
    strips = samples if planes else 1
    size = len(data) // strips
    lists = {  # each is one number, or stands behind the pixels
        273: [8 + size * strip for strip in range(strips)],
        279: [size] * strips,
    }
    tags = {256: [6], 257: [4], 258: [bits], 259: [1], 262: [photometric], 277: [samples], 278: [4]}
    tags |= lists | {284: [2 if planes else 1], 339: [form]}
    if extra is not None:
        tags[338] = [extra]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body, entries = data + bytes(len(data) % 2), b""
    for tag, values in sorted(tags.items()):
        value = values[0]
        if len(values) > 1:
            value = 8 + len(body)
            body += struct.pack(f"{order}{len(values)}L", *values)
        entries += struct.pack(f"{order}HHLL", tag, 4, len(values), value)
    start = struct.pack(f"{order}L", 8 + len(body))
    return mark + start + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def png(kind: int, depth: int, data: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Writes a PNG of one row: its pixels as they lie in the file, and chunks before them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))

    head = struct.pack(">LLBBBBB", width, 1, depth, kind, 0, 0, 0)
    body = b"".join(
        chunk(*c)
        for c in ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + data)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body
