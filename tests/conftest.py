import fcntl
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The second compiles tiny programs in half the time; later versions lack it, and an unknown flag
# ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import jax
import pytest
from support.golden_folders import golden_folder

# Their asserts show values, as those of test files do.
pytest.register_assert_rewrite("support.med_moe_checks", "support.uni_med_checks")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--goldens", default=None, help="folder of golden cases (default: those in tests/goldens)"
    )
    parser.addoption(
        "--real-data", default=None, help="folder of real data sets, as docs/real_data.md lays them out"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """Runs a whole lane in two processes if pytest-xdist is installed: half the time on two cores.

    The slow tests too: what they start waits for most of its time. Not what was asked for by file.
    `-n 0` turns it off.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the two, which must not start two of its own
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS or len(config.args) > 5
    options = config.option
    if (
        whole
        and options.markexpr in ("not slow", "slow")
        and getattr(options, "numprocesses", 0) is None
        and not options.usepdb
    ):
        options.numprocesses, options.dist = 2, "worksteal"


_compiled = pytest.StashKey[str]()


def pytest_configure(config):
    """Lets all tests share what they compile: here, in pytest-xdist's workers, in processes that
    tests start.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker's, which uses its starter's
        folder = config.stash[_compiled] = tempfile.mkdtemp(prefix="unimed_jax_compiled_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure(config):
    if _compiled in config.stash:
        shutil.rmtree(config.stash[_compiled], ignore_errors=True)
        del (
            os.environ["JAX_COMPILATION_CACHE_DIR"],
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"],
        )


@pytest.fixture(scope="session")
def real_data(request) -> Path:
    """The folder of real data sets; a test that asks for it is skipped where there is none."""
    given = request.config.getoption("--real-data") or os.environ.get("UNIMED_JAX_REAL_DATA")
    if not given:
        pytest.skip("needs real data: --real-data=DIR or UNIMED_JAX_REAL_DATA (docs/real_data.md)")
    return Path(given)


@pytest.fixture(scope="module")
def goldens(request) -> Path:
    return golden_folder(request.config, request.module)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """Gives built_once(name, build) -> a folder that `build(folder)` filled once for all tests,
    whatever worker asks.

    Tests only read it; what a test changes is a copy.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the workers' common one

    def built(name: str, build) -> Path:
        folder, done = base / "built" / name, base / "built" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with open(base / "built" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return built


@pytest.fixture(scope="session")
def cache(built_once) -> str:
    """A cache of prepared data sets that all tests share; preparing locks it by itself."""
    return str(built_once("prepared", lambda folder: None))


@pytest.fixture(scope="module")
def quick_compiles():
    """Compiles with few optimisations: half the time where tiny programs are compiled once and run
    once.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def on_one_device(quick_compiles):
    """Trains and answers on one device, because programs for eight compile slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimed_jax.model.sharding.make_mesh", lambda *settings: None)
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 32 MB that can be filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk ({done.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
