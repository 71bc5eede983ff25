"""Stores the images of a set in shards, by several processes, in the order in which they are asked for.

The images are cut into chunks that do not depend on the number of processes. Each chunk becomes one
shard, images-<number>.array_record, and a file facts/<number>.json, which is written after it and
says what it was made of. A later try reuses every shard whose facts still hold.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from unimed_jax import files, parsing
from unimed_jax.config import ImageConfig, ReencodeConfig
from unimed_jax.data.images import PLAIN, check_header, read_bytes, read_image
from unimed_jax.data.store import AT_RANDOM, RECORDS
from unimed_jax.errors import UserError

# of an image: a file, its bytes, or pixels uint8 [H, W] or [H, W, 3]
Source = str | Path | bytes | np.ndarray
FACTS = "facts"  # folder of the facts, while a set is prepared
# Small chunks come first, so that a small set is shared by all processes; large ones later, so that a
# large set has few files.
FIRST, LAST, SAME = 64, 4096, 8  # images of a chunk; chunks of the same size before it doubles
CHUNK_FILES = 256 << 20  # bytes of files in a chunk
CHUNK_MEMORY = 16 << 20  # bytes of images in memory in a chunk, which are sent to another process
AHEAD = 2  # chunks a process that may wait or be worked on


class Outcome(NamedTuple):
    """Says how an image was stored, or why it was not."""

    digest: str  # sha256 of what was stored, in hexadecimal; empty if it was left out
    reason: str = ""  # why it was left out
    sizes: tuple[int, int, int, int] | None = None  # width and height, before and after, if they changed
    frames: int = 1  # from which one was to be chosen


class ImageShards:
    """Collects the images of a set, lets them be stored, and gives the outcomes.

    Of several sources of one key the first counts.
    """

    def __init__(
        self, place: Path, image: ImageConfig, reencode: ReencodeConfig, pool: Executor, workers: int
    ):
        """Writes into the folder `place`, through a pool of `workers` processes."""
        self._place, self._settings, self._pool = place, (image, reencode), pool
        self._most = max(1, AHEAD * workers)  # chunks that are under way
        self._chunk_of: dict[str, int] = {}
        self._open: list[tuple[str, Source]] = []  # the chunk that is being collected
        self._files = self._memory = 0  # its bytes
        self._submitted = 0
        self._waiting: deque[Future] = deque()
        self._done = 0  # chunks whose outcomes are known
        self._fresh: dict[str, Outcome] = {}  # not used yet, or left out
        self._sizes: dict[str, tuple[int, int, int, int]] = {}
        self.keys: list[str] = []  # of the stored images, in their order
        self.digests: list[str] = []  # of the same
        self.records: dict[str, int] = {}  # by file
        (place / FACTS).mkdir(exist_ok=True)

    def ask(self, key: str, source: Source) -> None:
        """Puts an image on the list, unless its key is there already."""
        if key in self._chunk_of:
            return
        self._chunk_of[key] = self._submitted
        self._open.append((key, source))
        if isinstance(source, (bytes, np.ndarray)):
            self._memory += source.nbytes if isinstance(source, np.ndarray) else len(source)
        else:
            with contextlib.suppress(OSError, ValueError):  # whoever reads it says what is wrong
                self._files += os.stat(source).st_size
        most = min(LAST, FIRST << self._submitted // SAME)
        if len(self._open) >= most or self._files >= CHUNK_FILES or self._memory >= CHUNK_MEMORY:
            self.submit()

    def submit(self) -> None:
        """Lets the images on the list be stored."""
        if not self._open:
            return
        while len(self._waiting) >= self._most:
            self._take()
        images, number = self._open, self._submitted
        identity = _identity(images, *self._settings)
        known = _facts(self._place, number, identity)
        if known is None:
            work = (str(self._place), number, images, identity, *self._settings)
            try:
                self._waiting.append(self._pool.submit(store_chunk, *work))
            except BrokenProcessPool as error:
                raise _lost_process() from error
        else:
            self._waiting.append(_finished(known))
        self._submitted += 1
        self._open, self._files, self._memory = [], 0, 0

    def ready(self, keys: Sequence[str], wait: bool = False) -> bool:
        """Says whether the outcomes of all keys are known; with `wait` it waits until they are."""
        last = max((self._chunk_of[key] for key in keys), default=-1)
        while self._done <= last and self._waiting and (wait or self._waiting[0].done()):
            self._take()
        return self._done > last

    def left_out(self, keys: Sequence[str]) -> str:
        """Says why one of these images was left out; empty if all are stored."""
        return next((r for key in keys if (r := self._fresh.get(key, Outcome("")).reason)), "")

    def use(self, key: str) -> Outcome | None:
        """Returns the outcome of an image when it is used for the first time, and None later."""
        return self._fresh.pop(key, None)

    def sizes(self, key: str) -> tuple[int, int, int, int] | None:
        """Returns width and height of an image before and after, if it is stored in another size."""
        return self._sizes.get(key)

    def _take(self) -> None:
        """Waits for the oldest chunk and takes note of its outcomes."""
        try:
            found: dict[str, Outcome] = self._waiting.popleft().result()
        except BrokenProcessPool as error:
            raise _lost_process() from error
        stored = [key for key, outcome in found.items() if not outcome.reason]
        self._fresh |= found
        self._sizes |= {key: found[key].sizes for key in stored if found[key].sizes}  # type: ignore[misc]
        if stored:
            self.records[_name(self._done)] = len(stored)
        self.keys += stored
        self.digests += [found[key].digest for key in stored]
        self._done += 1


# ---- one chunk -------------------------------------------------------------------------------------
def store_chunk(
    place: str,
    number: int,
    images: Sequence[tuple[str, Source]],
    identity: str,
    image: ImageConfig,
    reencode: ReencodeConfig,
) -> dict[str, Outcome]:
    """Writes the shard of a chunk and its facts; returns the outcome of each key.

    If no image can be stored, nothing is written.
    """
    file, outcomes = Path(place) / _name(number), {}
    with files.written_whole(file) as unfinished:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # read at random
        for key, source in images:
            outcomes[key], data = encoded(key, source, image, reencode)
            if data is not None:
                writer.write(data)
        writer.close()
    if all(outcome.reason for outcome in outcomes.values()):
        file.unlink()
        return outcomes
    content = {"identity": identity, "bytes": file.stat().st_size, "outcomes": outcomes}
    files.write_json(Path(place) / FACTS / f"{number:05d}.json", content)
    return outcomes


def encoded(
    key: str, source: Source, image: ImageConfig, reencode: ReencodeConfig
) -> tuple[Outcome, bytes | None]:
    """Reads an image, and returns its outcome with the bytes to store.

    It is left out if its file cannot be read, if its header is not that of a picture, if the picture
    lacks what the settings `image` ask for, or if its end is missing. What comes after the header is
    decoded when it is needed, unless the image is encoded again here or its end looks odd.
    """
    try:
        if isinstance(source, np.ndarray):
            if reencode.asked and (again := _again(_three(source), b"", reencode)):
                return again
            buffer = io.BytesIO()
            Image.fromarray(source).save(buffer, "PNG")
            # Compression differs between versions of zlib, pixels do not.
            content = str(source.shape).encode() + source.tobytes()
            return Outcome(hashlib.sha256(content).hexdigest()), buffer.getvalue()
        if not isinstance(source, bytes) and (reason := no_image(Path(source))):
            return Outcome("", reason), None
        data = source if isinstance(source, bytes) else read_bytes(source)
        name = f"{key!r}" if isinstance(source, bytes) else str(source)
        frames = check_header(data, name, image)
        if may_be_cut(data):
            read_image(data if isinstance(source, bytes) else source, image)
        if reencode.asked:
            # Settings would be asked of what is stored, if it were read by them again.
            kept = data if image == PLAIN else None
            if again := _again(read_image(data, image), kept, reencode):
                return again[0]._replace(frames=frames), again[1]
        return Outcome(hashlib.sha256(data).hexdigest(), frames=frames), data
    except UserError as error:
        return Outcome("", str(error).rstrip(".")), None


# format: how its files begin, and how whole ones end but for padding
_ENDS = {
    "JPEG": (b"\xff\xd8\xff", b"\xff\xd9"),
    "PNG": (b"\x89PNG", b"IEND\xaeB`\x82"),
    "GIF": (b"GIF8", b";"),
    "JPEG 2000, bare": (b"\xff\x4f\xff\x51", b"\xff\xd9"),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\xd9"),
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNDEFINED = b"\xff\xff\xff\xff"  # length of DICOM's compressed pixels, which a mark closes


def may_be_cut(data: bytes) -> bool:
    """Says whether a picture's file may lack its end, so that it must be decoded to know.

    That looks at marks and sizes alone, as a download that broke off shows them, and costs nothing.
    True also for formats that state neither.
    """
    for begins, ends in _ENDS.values():
        if data.startswith(begins):
            return not data[-64:].rstrip(b"\0\r\n ").endswith(ends)
    if data[:4] == b"RIFF":  # WebP
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data[:2] == b"BM":
        return len(data) < int.from_bytes(data[2:6], "little")
    if data[:4] in _TIFF:
        return _tiff_end(data) > len(data)
    if data[128:132] == b"DICM" and (at := data.rfind(b"\xe0\x7f\x10\x00")) > 0:  # pixels, little endian
        explicit = data[at + 4 : at + 6] in (b"OW", b"OB")
        start = at + (12 if explicit else 8)
        length = data[start - 4 : start]
        if length == _UNDEFINED:
            return b"\xfe\xff\xdd\xe0" not in data[start:]
        return start + int.from_bytes(length, "little") > len(data)
    return True


def _tiff_end(data: bytes) -> float:
    """Returns where the last strip or tile of a TIFF's first page ends; infinity if it is not known."""
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as page:
            tags = page.tag_v2  # type: ignore[attr-defined]
            starts, sizes = (273, 279) if 273 in tags else (324, 325)  # strips or tiles
            return max(a + n for a, n in zip(tags[starts], tags[sizes], strict=True))
    except Exception:  # of a header that `check_header` could read, but not this
        return float("inf")


def _three(pixels: np.ndarray) -> np.ndarray:
    """Repeats grey uint8 [H, W] over three channels."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _again(
    pixels: np.ndarray, data: bytes | None, reencode: ReencodeConfig
) -> tuple[Outcome, bytes] | None:
    """Encodes an image uint8 [H, W, 3] again, if the settings ask for it.

    data: how it was found, None if it cannot be kept so. Returns None if it is to be kept.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, reencode.size / max(height, width)) if reencode.size else 1.0
    if scale == 1 and not reencode.format and data is not None:
        return None
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(pixels)
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    kind = reencode.format or ("jpeg" if (data or b"")[:3] == b"\xff\xd8\xff" else "png")
    kept = np.asarray(picture)
    grey = (kept[..., :1] == kept).all()
    buffer = io.BytesIO()
    quality = {} if kind == "png" else {"quality": reencode.quality}
    # WebP has no grey
    (picture.convert("L") if grey and kind != "webp" else picture).save(buffer, kind, **quality)
    # Encoders differ between versions, what they are given does not.
    content = f"{kind} {quality.get('quality')} {kept.shape}".encode() + kept.tobytes()
    sizes = (width, height, *size) if size != (width, height) else None
    return Outcome(hashlib.sha256(content).hexdigest(), "", sizes), buffer.getvalue()


def no_image(path: Path) -> str:
    """Says why the file of an image cannot be read, and returns an empty text if it can."""
    reason = parsing.no_file(path)
    return (
        f"no image {path}" if reason == "does not exist" else f"image {path} {reason}" if reason else ""
    )


# ---- facts -----------------------------------------------------------------------------------------
def _name(number: int) -> str:
    return f"images-{number:05d}.array_record"


def _identity(images: Sequence[tuple[str, Source]], image: ImageConfig, reencode: ReencodeConfig) -> str:
    """Computes what a chunk is known by: keys, state of the files or content, and settings."""
    digest = hashlib.sha256(f"{RECORDS} {image} {reencode}".encode())
    for key, source in images:
        digest.update(f"\0{key}\0".encode())
        if isinstance(source, np.ndarray):
            digest.update(str((source.shape, source.dtype)).encode() + source.tobytes())
        elif isinstance(source, bytes):
            digest.update(source)
        else:
            try:
                facts = os.stat(source)
                digest.update(f"{source} {facts.st_size} {facts.st_mtime_ns}".encode())
            except (OSError, ValueError):
                digest.update(f"{source} none".encode())
    return digest.hexdigest()


def _facts(place: Path, number: int, identity: str) -> dict[str, Outcome] | None:
    """Returns the outcomes of a chunk that an earlier try has stored, or None if there is none."""
    shard, file = place / _name(number), place / FACTS / f"{number:05d}.json"
    if not file.is_file() or not shard.is_file():
        return None
    try:
        content = parsing.read_json(file, "remove it")
        if content["identity"] != identity or content["bytes"] != shard.stat().st_size:
            return None
        found = {
            key: Outcome(digest, reason, tuple(sizes) if sizes else None, frames)
            for key, (digest, reason, sizes, frames) in content["outcomes"].items()
        }
        count = ArrayRecordReader(str(shard), AT_RANDOM).num_records()
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    return found if count == sum(not outcome.reason for outcome in found.values()) else None


# ---- processes -------------------------------------------------------------------------------------
@contextlib.contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Gives a pool of `workers` processes, which end with this one; 0: all is done in this process."""
    if not workers:
        yield here()
        return
    context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
    ear, mouth = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (ear,))
    try:
        yield pool
    except BaseException:
        mouth.close()  # ends the processes at once
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        mouth.close()


def _start(ear: Connection) -> None:
    """Lets a process of the pool end when the other end of `ear` closes, by whatever cause."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process answers

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            ear.recv()
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


class _Here(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        return _finished(fn(*args, **kwargs))


def here() -> Executor:
    """Gives a pool that does everything in this process."""
    return _Here()


class Later(Executor):
    """Keeps the arguments of what is submitted, which another machine is to run."""

    def __init__(self) -> None:
        self._kept: list[tuple] = []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        self._kept.append(args)
        return _finished({})

    def take(self) -> list[tuple]:
        """Returns what was kept since the last call."""
        kept, self._kept = self._kept, []
        return kept


def _finished(result) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def _lost_process() -> UserError:
    return UserError(
        "a process that stores images was ended from outside, as the system does when memory is "
        "short; give the same command again with fewer --workers, and it goes on with the next shard."
    )
