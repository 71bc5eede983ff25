"""Names the code that produced a result, and turns values into plain JSON."""

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plain(value):
    """Converts nested numpy values to JSON's own types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def joint_checksum(checksums: Sequence[str]) -> str:
    """Makes one checksum of several; a single one stays as it is."""
    return (
        checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()
    )


def code_version() -> str:
    """Names the package version and, in a git checkout, the commit: "0.1.0+g1a2b3c4 (modified)"."""
    folder = Path(__file__).resolve().parent
    try:
        version = importlib.metadata.version("unimed_jax")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside an unrelated checkout, so the commit counts only if it tracks
    # this file.
    if git("ls-files", "--error-unmatch", __file__) is None:
        return version
    commit = git("rev-parse", "--short=7", "HEAD")
    modified = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
    return f"{version}+g{commit}" + (" (modified)" if modified else "")


def protocol_id(
    *,
    set_id: str,
    checksum: str,
    split: str,
    only: str = "",
    rule: str = "",
    limit: int = 0,
    closed: bool,
    normaliser: str,
    form: str,
    max_words: int | None,
    fit: str,
    labels: str = "",
    metric: str,
) -> str:
    """Names everything that a score depends on besides the model.

    Scores with equal ids can be compared, others cannot (evaluate/protocol.py fills the parts in).

    The parts are set and revision, filter, split (and the rule that made it), how many examples were
    chosen, rule for closed questions, normaliser, prompt form, words of a reference, image fit, labels,
    metric:
    "brain@1a2b3c4d/test/closed=answer_type/norm=nfkc-lower-signs/form=unimed/fit=stretch/exact_match".
    """
    parts = [
        f"{set_id}@{checksum[:8]}",
        f"only={only}" if only else "",
        f"{split}={rule.replace(' ', '_')}" if rule else split,
        f"limit={limit}" if limit else "",
        "closed=answer_type" if closed else "",
        f"norm={normaliser}" if normaliser else "",
        f"form={form}",
        f"words={max_words}" if max_words is not None else "",
        f"fit={fit}" if fit else "",
        f"labels={labels}" if labels else "",
        metric,
    ]
    return "/".join(part for part in parts if part)
