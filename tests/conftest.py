import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The second compiles tiny programs in half the time; later versions lack it, and an unknown flag ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

# What one test compiled, the others load: in this process, in the workers of pytest-xdist, in processes that tests start.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="unimed_jax_tests_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser):
    parser.addoption("--goldens", default=None, help="folder of golden cases (default: those in tests/goldens)")


def pytest_unconfigure(config):
    if _COMPILED:  # None in the workers, which use the folder of the process that started them
        shutil.rmtree(_COMPILED, ignore_errors=True)


def golden_folder(config, module) -> Path:
    """`--goldens`, or the folder in tests/goldens that a test file names as its GOLDENS (Uni-Med's without)."""
    return Path(config.getoption("--goldens") or GOLDENS / getattr(module, "GOLDENS", "uni_med"))


@pytest.fixture(scope="module")
def goldens(request) -> Path:
    return golden_folder(request.config, request.module)


@pytest.fixture(scope="module")
def quick_compiles():
    """Compiles with few optimisations: half the time where tiny programs are compiled once and run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
