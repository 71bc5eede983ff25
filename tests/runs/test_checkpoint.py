"""Checkpoints: what comes back, on which devices, and what happens when the disk lost or changed
something.
"""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unimed_jax.errors import UserError
from unimed_jax.runs.checkpoint import Checkpoints, Replaced, fingerprints


def trees(seed: int = 0):
    """Weights and an optimiser state with several dtypes, ranks and sizes."""
    rng = np.random.default_rng(seed)
    weights = {
        "decoder/kernel": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32),
        "vision/kernel": jnp.asarray(rng.standard_normal((2, 8, 8)), jnp.bfloat16),
        "scale": jnp.asarray(rng.standard_normal(8), jnp.float16),
    }
    moments = {
        path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in weights.items()
    }
    return weights, (jnp.int32(seed), moments)


def fill(folder, steps=(4, 8)) -> None:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, *trees(step), {"rows_read": step})
    checkpoints.close()


def assert_holds(folder, step: int, read_only: bool = False) -> None:
    """A reader gets exactly what was saved after `step`."""
    checkpoints = Checkpoints(folder, read_only=read_only)
    weights, optimizer, note = checkpoints.restore(*trees())
    assert checkpoints.latest() == step and note == {"rows_read": step}
    for ours, theirs in zip(
        jax.tree.leaves((weights, optimizer)), jax.tree.leaves(trees(step)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    checkpoints.close()


def files(folder) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


# ---- save and restore ------------------------------------------------------------------------------
def test_the_newest_is_restored_and_the_older_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (2, 10, 11):
        checkpoints.save(step, *trees(step), {"rows_read": step})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    assert_holds(tmp_path, 11)


def test_weights_alone_and_in_another_dtype(tmp_path):
    fill(tmp_path)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in trees()[0].items()}
    assert checkpoints.saved_weights() == set(wanted)
    weights, optimizer, _ = checkpoints.restore(wanted)
    assert optimizer is None
    for path, leaf in trees(8)[0].items():
        assert weights[path].dtype == jnp.float32
        np.testing.assert_array_equal(weights[path], leaf.astype(jnp.float32))


def test_another_model_is_refused_and_nothing_falls_back(tmp_path):
    fill(tmp_path)
    weights, optimizer = trees()
    weights["scale"] = jnp.zeros(9)
    checkpoints = Checkpoints(tmp_path)
    words = r"8/weights belongs to another model: scale is \(8,\) there and \(9,\) here"
    with pytest.raises(UserError, match=rf"^checkpoint \S*{words}"):
        checkpoints.restore(weights, optimizer)
    assert checkpoints.latest() == 8


def test_nothing_to_restore(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        Checkpoints(tmp_path).restore(*trees())
    with pytest.raises(UserError, match="nowhere does not exist"):
        Checkpoints(tmp_path / "nowhere", read_only=True)


def test_what_a_killed_save_or_deletion_left_is_no_checkpoint_and_goes(tmp_path):
    fill(tmp_path)
    (tmp_path / "8").rename(tmp_path / "8.orbax-checkpoint-tmp")
    (tmp_path / "3.deleted" / "weights").mkdir(parents=True)
    assert_holds(tmp_path, 4, read_only=True)
    assert len(list(tmp_path.iterdir())) == 3  # a reader touches nothing: the run may be at work
    assert_holds(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


# ---- damage ----------------------------------------------------------------------------------------
def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture
def damaged(tmp_path):
    """Checkpoints 4 and 8, of which the newest lacks the end of its largest file."""
    fill(tmp_path)
    cut_short(max(files(tmp_path / "8"), key=lambda file: file.stat().st_size))
    return tmp_path


def test_a_damaged_checkpoint_is_reported_kept_aside_and_its_step_saved_again(damaged, capsys):
    assert_holds(damaged, 4)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"checkpoint {damaged}/8 is damaged" in said and "kept as 8.damaged, and 4 is used" in said
    fill(damaged, steps=[8])
    assert_holds(damaged, 8)
    assert not capsys.readouterr().err
    assert sorted(path.name for path in damaged.iterdir()) == ["4", "8", "8.damaged"]


def test_a_reader_of_a_damaged_checkpoint_leaves_it_where_it_is(damaged, capsys):
    assert_holds(damaged, 4, read_only=True)
    assert "8 is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in damaged.iterdir()) == ["4", "8"]


def test_damaged_checkpoints_alone_are_a_sentence_and_stay(damaged):
    (damaged / "4/note/note.json").unlink()
    for read_only in (True, False):
        with pytest.raises(
            UserError,
            match=r"holds only damaged checkpoints \(8: .*; 4: .*note.json does not exist.*train",
        ):
            Checkpoints(damaged, read_only=read_only).restore(*trees())
    assert sorted(path.name for path in damaged.iterdir()) == ["4", "8"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"note": {}', None], ids=str)
def test_a_broken_note_is_damage(tmp_path, text):
    fill(tmp_path)
    note = tmp_path / "8/note/note.json"
    if text is None:  # JSON still, but another number
        text = note.read_text().replace('"rows_read": 8', '"rows_read": 9')
        assert text != note.read_text()
    note.write_text(text)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.saved_weights() == set(trees()[0])
    assert_holds(tmp_path, 4)


@pytest.mark.parametrize("harm", ["missing", "cut short", "flipped"])
def test_whatever_happens_to_any_file_what_is_restored_was_saved(tmp_path, harm, capsys):
    """Every file in turn.

    A file that matters makes the one before come back, another one changes nothing.
    """
    rng, fell_back = random.Random(0), set()
    fill(tmp_path)
    for file in files(tmp_path / "8"):
        content = file.read_bytes()
        for _ in range(4 if harm == "flipped" else 1):
            if harm == "missing":
                file.unlink()
            elif harm == "cut short":
                cut_short(file)
            else:
                flip(file, rng.randrange(8 * len(content)))
            checkpoints = Checkpoints(tmp_path, read_only=True)
            restored = checkpoints.restore(*trees())[:2]
            for ours, theirs in zip(
                jax.tree.leaves(restored), jax.tree.leaves(trees(checkpoints.latest())), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs, err_msg=str(file))
            fell_back |= {file} if checkpoints.latest() == 4 else set()
            file.write_bytes(content)
    assert capsys.readouterr().err.count("is damaged") >= len(fell_back) >= 5
    arrays = {
        file
        for file in files(tmp_path / "8")
        if file.parent.name == "d" and file.parents[1].name != "array"
    }
    assert tmp_path / "8/note/note.json" in fell_back and arrays & fell_back


def test_a_value_that_changed_between_memory_and_disk_is_seen(tmp_path, monkeypatch):
    """What no checksum of a file can see: every file is whole, and holds something else."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, *trees(4), {"rows_read": 4})
    save = checkpoints._orbax.save

    def other(folder, arguments):
        kernel = arguments["weights"].item["decoder/kernel"]
        arguments["weights"].item["decoder/kernel"] = kernel.at[3, 5].set(
            jnp.nextafter(kernel[3, 5], 9.0)
        )
        save(folder, arguments)

    monkeypatch.setattr(checkpoints._orbax, "save", other)
    checkpoints.save(8, *trees(8), {"rows_read": 8})
    checkpoints.close()
    assert_holds(tmp_path, 4)


# ---- fingerprints ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint4", "bool"]
)
def test_every_flipped_bit_changes_the_fingerprint(dtype):
    width = 1 if dtype == "bool" else 4 if dtype == "uint4" else 8 * jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (3, 2, width))

    def array(bits):
        numbers = (bits << np.arange(width)).sum(-1)  # [3, 2]
        if dtype in ("bool", "uint4"):
            return jnp.asarray(numbers).astype(dtype)
        return jnp.asarray(numbers.astype(f"uint{width}").view(jnp.dtype(dtype)))

    seen = {int(fingerprints(array(bits)))}
    for place in np.ndindex(bits.shape):
        flipped = bits.copy()
        flipped[place] ^= 1
        seen.add(int(fingerprints(array(flipped))))
    assert len(seen) == bits.size + 1


def test_a_fingerprint_tells_order_and_knows_no_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    number = int(fingerprints(x))
    assert int(fingerprints(x[::-1])) != number and int(fingerprints(x.T)) != number
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    for spec in (
        PartitionSpec("a", "b"),
        PartitionSpec(("b", "a")),
        PartitionSpec(None, "b"),
        PartitionSpec(),
    ):
        assert int(fingerprints(jax.device_put(x, NamedSharding(mesh, spec)))) == number


# ---- other devices ---------------------------------------------------------------------------------
MOVE = """
import sys
sys.path.insert(0, "tests/runs")
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_checkpoint import trees
from unimed_jax.runs.checkpoint import Checkpoints
verb, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert len(jax.devices()) == count
mesh = Mesh(np.array(jax.devices()).reshape(-1, min(count, 2)), ("a", "b"))
specs = {(16, 24): PartitionSpec("a", "b"), (8,): PartitionSpec("b")}
specs[2, 8, 8] = PartitionSpec(None, ("b", "a"))
place = lambda leaf: NamedSharding(mesh, specs.get(leaf.shape, PartitionSpec()))
checkpoints = Checkpoints(folder)
if verb == "save":
    checkpoints.save(8, *jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), trees(8)), {})
else:
    shape_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))
    like = jax.tree.map(shape_of, trees())
    found = checkpoints.restore(*like)[:2]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(trees(8)), strict=True):
        assert ours.sharding == place(theirs) and ours.dtype == theirs.dtype, ours.sharding
        np.testing.assert_array_equal(ours, theirs)
    print("equal on", count)
checkpoints.close()
"""


def move(verb: str, folder, count: int) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    command = [sys.executable, "-c", MOVE, verb, str(folder), str(count)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_saved_on_eight_devices_restored_on_one_two_and_four(tmp_path):
    saved = move("save", tmp_path, 8)
    assert saved.wait() == 0, saved.stderr.read()
    for count, process in [(count, move("restore", tmp_path, count)) for count in (1, 2, 4)]:
        out, error = process.communicate()
        assert out.strip() == f"equal on {count}", error[-2000:]
    assert_holds_without_shardings(tmp_path)


SHARE = """
import sys
sys.path.insert(0, "tests/runs")
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_checkpoint import damage_of_process, trees
from unimed_jax.runs.checkpoint import Checkpoints
folder, address, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, number)
mesh = Mesh(np.array(jax.devices()), ("a",))
specs = {(16, 24): PartitionSpec("a"), (64, 64): PartitionSpec("a")}
def large(step):  # arrays below 1 kB are no files of their own
    return *trees(step), np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
place = lambda leaf: NamedSharding(mesh, specs.get(leaf.shape, PartitionSpec()))
def put(leaf):
    return jax.make_array_from_callback(leaf.shape, place(leaf), lambda index: np.asarray(leaf)[index])
checkpoints = Checkpoints(folder)
for step in (4, 8):
    weights, optimizer, kernel = jax.tree.map(put, large(step))
    checkpoints.save(step, weights | {"large": kernel}, optimizer, {})
checkpoints.close()
if number == 0:
    damage_of_process(folder + "/8", 1)
multihost_utils.sync_global_devices("damaged")
checkpoints = Checkpoints(folder)
weights, optimizer, kernel = jax.tree.map(put, large(0))
weights, optimizer, _ = checkpoints.restore(weights | {"large": kernel}, optimizer)
assert checkpoints.latest() == 4
kernel = weights.pop("large")
found = jax.tree.leaves((weights, optimizer, kernel))
for ours, theirs in zip(found, jax.tree.leaves(large(4)), strict=True):
    assert ours.sharding == place(theirs)
    for shard in ours.addressable_shards:
        np.testing.assert_array_equal(shard.data, theirs[shard.index])
checkpoints.close()
"""


def damage_of_process(folder: str, number: int) -> None:
    """Empties the files of arrays that this process wrote and no other."""
    owned = [
        file
        for file in files(folder)
        if file.parent.name == "d" and file.parents[1].name.endswith(f"_{number}")
    ]
    assert owned
    for file in owned:
        file.write_bytes(b"")


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_read_neither_uses(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": ""}
    pipes = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", SHARE, str(tmp_path), address]
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-1500:] + said[1][-1500:]
    assert "8 is damaged" in said[0] and "damaged" not in said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "8.damaged"]


def assert_holds_without_shardings(folder) -> None:
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trees())
    weights, _, _ = Checkpoints(folder, read_only=True).restore(*wanted)
    for path, leaf in trees(8)[0].items():
        assert len(weights[path].devices()) == 1
        np.testing.assert_array_equal(weights[path], leaf)


# ---- a full disk -----------------------------------------------------------------------------------
def test_a_save_that_fails_is_raised_at_the_next_step_and_leaves_the_last_one(tmp_path):
    """The child may write files of 60 kB at most, so the second, larger checkpoint cannot be written.

    Nothing but the error says so, though thirty writes fail.
    """
    code = """
import contextlib, resource, signal, sys, time
sys.path.insert(0, "tests/runs")
import jax.numpy as jnp, numpy as np
from test_checkpoint import trees
from unimed_jax.runs.checkpoint import Checkpoints
from unimed_jax.processes import quiet
stack = contextlib.ExitStack()
stack.enter_context(quiet())  # as main() does
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(4, *trees(4), {"rows_read": 4})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
rng = np.random.default_rng(0)
big = {str(i): jnp.asarray(rng.standard_normal(20_000)) for i in range(30)}
checkpoints.save(8, big, trees(8)[1], {})
for _ in range(600):
    try:
        checkpoints.check()
    except ValueError as error:
        print(error)
        break
    time.sleep(0.1)
checkpoints.close()
print(checkpoints.latest())
stack.close()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "os_error_code='27'" in done.stdout and done.stdout.split()[-1] == "4" and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["4"]
    assert_holds(tmp_path, 4)


def test_the_note_says_what_the_arrays_are(tmp_path):
    fill(tmp_path, steps=[4])
    note = json.loads((tmp_path / "4/note/note.json").read_text())
    assert note["arrays"]["weights"]["vision/kernel"]["shape"] == [2, 8, 8]
    assert note["arrays"]["weights"]["vision/kernel"]["dtype"] == "bfloat16"
    assert set(note["arrays"]["optimizer"]) == {"0", *(f"1/{path}" for path in trees()[0])}


# ---- a run that trains meanwhile -------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["listed", "reading"])
def test_a_checkpoint_deleted_by_its_run_while_it_is_read_is_not_damaged(
    tmp_path, monkeypatch, capsys, moment
):
    """The run saves 12 and 16 and deletes 4 and 8 after a reader has listed those, or while it
    reads 8.
    """
    fill(tmp_path)
    reader, read = Checkpoints(tmp_path, read_only=True), Checkpoints._read

    def rotated(self, step, *given):
        if step == 8:
            fill(tmp_path, (12, 16))
        return read(self, step, *given)

    if moment == "listed":
        fill(tmp_path, (12, 16))
    monkeypatch.setattr(Checkpoints, "_read", rotated)
    assert reader.newest_note() == {"rows_read": 16 if moment == "listed" else 8}
    assert reader.restore(*trees())[2] == {"rows_read": 16} and reader.latest() == 16
    with pytest.raises(
        Replaced, match="/8 was deleted by the run that trains there .* give the same command again"
    ):
        Checkpoints(tmp_path, read_only=True).restore(*trees(), only=8)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("moment", ["check", "save", "wait"])
def test_a_folder_deleted_under_its_run_is_one_sentence(tmp_path, moment):
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, *trees(), {})
    if moment != "wait":
        checkpoints.wait()
    # at once, where deleting races with what is being written
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    act = {
        "check": checkpoints.check,
        "wait": checkpoints.wait,
        "save": lambda: checkpoints.save(4, *trees(), {}),
    }
    with pytest.raises(UserError, match="run/checkpoints was deleted or moved while its run went on"):
        act[moment]()
    assert not (folder / "2").exists() and not (folder / "4").exists()
