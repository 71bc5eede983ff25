"""Runs a frozen encoder once on each training image, and reads its features in place of pixels.

    <config.data.cache>/features/<encoder>/
      <images>.array_record   what made the features, and of which images; then a record for each image:
                              bfloat16 [patches, width]

<encoder> is a checksum of the encoder's weights and of every setting that its output depends on, and
an image is known by the checksum of its content and of how that is read. So whatever changes, nothing
old is ever used, and only what is missing is computed: after a kill the images of unfinished files,
after an addition to a data set the new images. A file is written whole or not at all. The folder can
be deleted whenever no run uses it.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.sharding import Mesh
from tqdm import tqdm

from unimed_jax import files, processes
from unimed_jax.config import Config
from unimed_jax.data.example import Dataset
from unimed_jax.data.pipeline import Pipeline
from unimed_jax.data.store import AT_RANDOM, Shards
from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.runs.checkpoint import fingerprints

FORM = 1  # of the files; raise it when they change
FILE_BYTES, FILE_IMAGES = 256 << 20, 4096  # of one file at most
DIGEST = "S32"  # numpy's type of an image's 32 bytes
# One image a record, to be read at random. Compression would save a fifth, and take most of the time.
WRITING = "group_size:1,uncompressed"
OVERHEAD = 1.01  # bytes of a file for each byte of features
LATE = 90.0  # seconds within which a network file system shows the files of other processes


class Picture(NamedTuple):
    """Names an image, and where it is read."""

    digest: bytes
    dataset: Dataset
    key: str


def cached(
    config: Config, pipeline: Pipeline, model: UniMed, frozen: Mapping[str, Any], mesh: Mesh | None
) -> "Features":
    """Opens the features of all images that `pipeline` may draw, and computes first what is missing.

    frozen: the leaves that do not train, which hold the encoder's. All processes of a run call it,
    inside `sharding.inside(mesh)`. Raises UserError if the features do not fit on the disk, or are
    damaged.
    """
    encoder = {path: leaf for path, leaf in frozen.items() if path.startswith("vision/")}
    maker = maker_of(config, encoder)
    folder = config.data.cache_folder / "features" / hashlib.sha256(maker.encode()).hexdigest()[:16]
    shape = (config.model.vision.patches, config.model.vision.width)
    with processes.explain_lost_process(), _alone(folder) as hindrance:
        features = Features(folder, maker, shape)
        missing = list(_missing(features, pipeline.pictures()))
        digests = np.array([picture.digest for picture in missing], DIGEST)
        # All processes encode together, so they must agree on what.
        if len(set(processes.gathered(hashlib.sha256(digests.tobytes()).hexdigest()))) > 1:
            raise _not_shared(folder)
        if missing:
            if hindrance:
                raise _unwritable(folder, hindrance)
            begun = time.monotonic()
            _check_space(folder, features, len(missing))
            _compute(missing, config, pipeline, model, encoder, mesh, features)
            processes.gathered(0)  # all files are there now
            features, end = Features(folder, maker, shape), time.monotonic() + LATE
            while not features.has(digests).all():
                if time.monotonic() > end:
                    raise _not_shared(folder)
                time.sleep(1)
                features = Features(folder, maker, shape)
            processes.say(f"encoded {len(missing):,} images in {time.monotonic() - begun:.0f} s")
    return features


def maker_of(config: Config, encoder: Mapping[str, Any]) -> str:
    """Describes, as JSON, all that the features of an image depend on besides the image.

    These are the encoder's weights and settings, and how a picture is fitted to it. On another kind of
    device or mesh the encoder rounds otherwise, which this leaves out.
    """
    weights = jax.device_get(fingerprints(dict(encoder)))
    content = {
        "form": FORM,
        "weights": {path: list(map(int, jax.tree.leaves(part))) for path, part in weights.items()},
        "vision": dataclasses.asdict(config.model.vision),
        "compute_dtype": config.model.compute_dtype,
        "fit": config.data.fit,
    }
    return json.dumps(content, sort_keys=True)


def _missing(features: "Features", pictures: Iterable[tuple[Dataset, str]]) -> Iterator[Picture]:
    """Yields the pictures without features, each content once."""
    seen: set[bytes] = set()
    for dataset, key in pictures:
        picture = Picture(dataset.digest(key), dataset, key)
        if picture.digest not in seen and not features.has(picture.digest):
            seen.add(picture.digest)
            yield picture


def _check_space(folder: Path, features: "Features", count: int) -> None:
    """Says the size of the features of `count` images; raises UserError if the disk lacks it."""
    needed = OVERHEAD * count * features.bytes
    free = processes.from_leader(shutil.disk_usage(folder).free)
    if needed > free:
        raise UserError(
            f"the features of {count:,} images need {needed / 2**30:.2f} GiB in {folder}, where "
            f"{free / 2**30:.2f} are free; free some space, set config.data.cache to another disk, or "
            "leave config.train.cache_features out."
        )
    processes.say(
        f"the encoder's features of {count:,} images are computed once ({needed / 2**30:.2f} GiB in "
        f"{folder}; {len(features):,} are there)"
    )


def _not_shared(folder: Path) -> UserError:
    return UserError(
        f"the processes of the run do not find the same files in {folder}; set config.data.cache to a "
        "folder that all of them share, or leave config.train.cache_features out."
    )


def _unwritable(folder: Path, reason: str) -> UserError:
    return UserError(f"features cannot be kept in {folder} ({reason}); set config.data.cache.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[str]:
    """Lets one run at a time work in a folder; a second one waits, and finds what the first has made.

    Yields why nothing can be written there, if that is so: the folder may hold all that is wanted.
    """
    lock, hindrance = None, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w") if processes.leads() else None
    except OSError as error:
        hindrance = error.strerror or str(error)
        if not folder.is_dir():
            raise _unwritable(folder, hindrance) from error
    with lock or contextlib.nullcontext():
        if lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                processes.say(f"another run computes features in {folder}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # some file systems have no locks
                pass
            files.remove_leftovers(folder)
        yield processes.from_leader(hindrance)  # the others look when the leader may


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class Features:
    """Reads the features of images from the files of a folder."""

    def __init__(self, folder: Path, maker: str, shape: tuple[int, int]):
        """Opens the files that `maker` (see `maker_of`) has made, of features of this shape.

        Raises UserError for a file that is damaged, or that something else has made.
        """
        self.folder, self.maker, self.shape = folder, maker, shape
        self.bytes = 2 * shape[0] * shape[1]  # of an image
        records: dict[str, dict[str, int]] = {}
        digests, numbers = [np.zeros(0, DIGEST)], [np.zeros(0, np.int64)]
        total = 0
        for path in sorted(folder.glob("*.array_record")):
            found = self._images_of(path)
            records[path.name] = {"records": 1 + len(found)}
            digests.append(found)
            numbers.append(total + 1 + np.arange(len(found)))
            total += 1 + len(found)
        self._shards = Shards(folder, records, "")
        self._digests = np.concatenate(digests)
        order = np.argsort(self._digests, kind="stable")
        self._digests, self._numbers = self._digests[order], np.concatenate(numbers)[order]

    def __len__(self) -> int:
        return len(self._digests)

    def has(self, digests: Any) -> Any:
        """Says of one digest or of an array of them whether the image's features are there."""
        wanted = np.asarray(digests, DIGEST)
        if not len(self):
            return np.zeros(wanted.shape, bool)
        at = np.searchsorted(self._digests, wanted)
        return self._digests[np.minimum(at, len(self) - 1)] == wanted

    def read(self, digest: bytes) -> np.ndarray:
        """Returns the features of an image, bfloat16 [patches, width]."""
        if not self.has(digest):
            raise KeyError(digest.hex())
        number = int(self._numbers[np.searchsorted(self._digests, np.array(digest, DIGEST))])
        try:
            (data,) = self._shards.read([number])
            return np.frombuffer(data, jnp.bfloat16).reshape(self.shape)  # [patches, width]
        except (OSError, IndexError, ValueError, RuntimeError) as error:
            path = self._shards.path_of(number)
            if not path.exists():
                raise UserError(
                    f"file of features {path} was removed while a run used it; start the run again, and "
                    "those of its images are computed again."
                ) from error
            raise _damaged(path, error) from error

    def _images_of(self, path: Path) -> np.ndarray:
        """Reads the first record of a file, and returns the digests of its images."""
        try:
            reader = ArrayRecordReader(str(path), AT_RANDOM)
            first = json.loads(reader.read([0])[0])
            maker, images = first["maker"], bytes.fromhex(first["images"])
            if reader.num_records() != 1 + len(images) // 32:
                raise ValueError(f"{reader.num_records() - 1} images")
        except (OSError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, error) from error
        if maker != self.maker:
            raise UserError(
                f"{path} holds the features of another encoder; remove it, and those of its images are "
                "computed again."
            )
        return np.frombuffer(images, DIGEST)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"file of features {path} is damaged ({reason}); remove it, and those of its images are "
        "computed again."
    )


# --------------------------------------------------------------------------------------------------
# Computing
# --------------------------------------------------------------------------------------------------


def _compute(
    missing: Sequence[Picture],
    config: Config,
    pipeline: Pipeline,
    model: UniMed,
    encoder: Mapping[str, Any],
    mesh: Mesh | None,
    features: Features,
) -> None:
    """Encodes the missing images on all devices, and lets each process write those of its own.

    As many images are encoded at once as in a training step, so that they fit into memory.
    """
    together = config.data.rows // config.train.accumulation * config.data.row_images
    share = sharding.share_of_process(mesh, together)
    # of every process as many, even if it has no image left
    parts = [
        [missing[first + row] for row in share.rows if first + row < len(missing)]
        for first in range(0, len(missing), together)
    ]
    writes = _written_here(share)

    out = None if mesh is None else sharding.row_sharding((together, *features.shape), mesh)
    # Of the model's other leaves there are only shapes, which nothing reads.
    encode = jax.jit(
        lambda leaves, images: with_parameters(model, leaves).features(images).astype(jnp.bfloat16),
        out_shardings=out,
    )

    def load(picture: Picture) -> np.ndarray:
        return pipeline.fitted(picture.dataset, picture.key)

    with (
        concurrent.futures.ThreadPoolExecutor(max(1, config.data.threads)) as pool,
        tqdm(
            desc="encoding images", total=len(missing), unit=" images", leave=False,
            disable=None if processes.leads() else True,
        ) as bar,
    ):  # fmt: skip

        def encoded() -> Iterator[np.ndarray]:
            """Yields the features of `parts`; a step runs while the next one's images are decoded."""
            side, before = config.model.vision.image_size, None
            for loaded in _ahead(pool, load, parts):
                images = np.zeros((len(share.rows), side, side, 3), np.uint8)
                if loaded:
                    images[: len(loaded)] = loaded
                arrays = sharding.on_devices({"images": images}, mesh, share)
                now = encode(encoder, arrays["images"]), len(loaded)
                if before is not None:
                    yield from _here(before[0], mesh)[: before[1]]
                    bar.update(min(together, len(missing) - bar.n))
                before = now
            if before is not None:
                yield from _here(before[0], mesh)[: before[1]]

        every, own = encoded(), [flag for part in parts for flag in writes[: len(part)]]
        pictures = itertools.compress(itertools.chain.from_iterable(parts), own)
        _write(list(pictures), itertools.compress(every, own), features)
        for _ in every:  # the steps of the others
            pass


def _written_here(share: sharding.Share) -> list[bool]:
    """Says of each of this process's rows whether it writes that row's features.

    Processes whose devices split the model have rows in common: the first of them writes.
    """
    writer: dict[int, int] = {}
    for process, rows in enumerate(processes.gathered(share.rows)):
        writer = dict.fromkeys(rows, process) | writer
    return [writer[row] == jax.process_index() for row in share.rows]


def _ahead(
    pool: concurrent.futures.Executor,
    load: Callable[[Picture], np.ndarray],
    parts: Iterable[list[Picture]],
) -> Iterator[list[np.ndarray]]:
    """Yields the pixels of each part, while those of the next one are being loaded."""
    waiting = None
    for part in parts:
        waiting, ready = [pool.submit(load, picture) for picture in part], waiting
        if ready is not None:
            yield [future.result() for future in ready]
    if waiting is not None:
        yield [future.result() for future in waiting]


def _here(x: jax.Array, mesh: Mesh | None) -> np.ndarray:
    """Returns the rows of an array that are on this process's devices."""
    if mesh is None:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def _write(pictures: Sequence[Picture], rows: Iterator[np.ndarray], features: Features) -> None:
    """Writes features, which `rows` yields in the order of their pictures, in files of bounded size."""
    size = max(1, min(FILE_IMAGES, FILE_BYTES // features.bytes))
    for start in range(0, len(pictures), size):
        digests = [picture.digest for picture in pictures[start : start + size]]
        name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
        with files.written_whole(features.folder / f"{name}.array_record") as unfinished:
            writer = ArrayRecordWriter(str(unfinished), WRITING)
            first = {"maker": features.maker, "images": b"".join(digests).hex()}
            writer.write(json.dumps(first).encode())
            for row in itertools.islice(rows, len(digests)):
                writer.write(row.tobytes())
            writer.close()
