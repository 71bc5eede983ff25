"""Writes the sections about the data and about how the run was made."""

from collections.abc import Mapping, Sequence
from typing import Any

from unimed_jax.analyze.run_report.facts import AUDIT, Data, Facts, command, flat
from unimed_jax.analyze.run_report.markup import Markup, details, joined, named, prose, table, tag
from unimed_jax.analyze.run_report.scores import cases, signed
from unimed_jax.audit.report import MEANING
from unimed_jax.evaluate.report.markdown import ABOUT_PROTOCOLS

CHANGED = "The data here is in another state than the one that was scored."


# ---- data ------------------------------------------------------------------------------------------
def sheet(runs: Sequence[Facts], data: Data) -> Markup:
    """Writes a sheet for each set that was scored: passport, splits, and what leaks between them."""
    first: dict[str, tuple[Facts, Mapping[str, Any]]] = {}
    for run in runs:
        for name, entry in run.metrics["data"].items():
            first.setdefault(name, (run, entry))
    parts = []
    for name, (run, entry) in first.items():
        parts += [
            tag("h3", name),
            tag("p", CHANGED, class_="note") if data.changed(name, entry) else "",
            tag("p", entry["note"], class_="note") if entry.get("note") else "",
            named(
                [
                    ("Licence", entry.get("licence") or "not stated"),
                    ("Citation", entry.get("citation")),
                    ("Checksum", tag("code", entry.get("checksum", "")[:16])),
                    ("Intervals over", f"{entry.get('cluster_word', 'example')}s"),
                ]
            ),
            table(("split", "examples", "by task"), data.counts(name), f"{name}: splits"),
            _leaks(name, run, entry),
        ]
    if data.missing:
        parts.append(tag("p", f"Data did not open here, so its splits are not counted: {data.missing}."))
    return joined(parts)


def _leaks(name: str, run: Facts, entry: Mapping[str, Any]) -> Markup:
    """Lists what one split gives away of another, as the audit of the data found."""
    found = (run.audit or {}).get("sets", {}).get(name)
    if found is None:
        words = command("data", "check", "--config=FILE", f"--out={(run.folder / AUDIT).parent}")
        about = " looks for leaks between splits and sets, and the next report shows them."
        return tag("p", "Not audited: ", tag("code", words), about)
    stale = found.get("checksum") != entry.get("checksum")
    between = sorted({pair for counts in found["leaks"].values() for pair in counts})
    reasons = found.get("by_design", {})
    rows = []
    for kind, counts in found["leaks"].items():
        if any(counts.values()):
            words = kind  # one of another version stands there as it is
            if kind in MEANING:
                words = MEANING[kind].format(cluster=found.get("cluster", "example"))
            design = f" (by design: {reasons[kind]})" if kind in reasons else ""
            rows.append([words + design, *(counts.get(pair, 0) for pair in between)])
    arrows = [pair.replace("_", " → ", 1) for pair in between]
    head = ("of the later split, given away by the earlier", *arrows)
    note = "The audit is of another state of this set." if stale else ""
    return joined(
        (
            tag("p", note, class_="note") if note else "",
            table(head, rows, f"{name}: leaks between splits")
            or tag("p", "The audit found nothing that one split gives away of another."),
        )
    )


# ---- how it was made -------------------------------------------------------------------------------
def made(runs: Sequence[Facts]) -> Markup:
    """Writes environment, command, checksums, settings and protocols."""
    return joined(
        (
            *(_made(run) for run in runs),
            details("Settings that differ", _differing(runs), opened=True) if len(runs) > 1 else "",
            *(
                details(
                    joined((signed(run), " All settings")),
                    table(("setting", "value"), flat(run.settings).items(), "Settings"),
                )
                for run in runs
            ),
            details("Protocols", _protocols(runs), prose(ABOUT_PROTOCOLS)),
        )
    )


def _made(run: Facts) -> Markup:
    metrics, last = run.metrics, run.environment[-1] if run.environment else {}
    packages = ", ".join(f"{name} {version}" for name, version in last.get("packages", {}).items())
    cost = run.cost or {}
    inputs = (run.inputs or {}).get("inputs", {})
    changes = (run.inputs or {}).get("changes", [])
    accepted = "; ".join(f"{change['name']} after step {change['step']}" for change in changes)
    minutes = f"{cost['seconds'] / 60:.1f} minutes of work" if "seconds" in cost else None
    return joined(
        (
            tag("h3", signed(run), " ", run.name),
            named(
                [
                    ("Steps", metrics.get("step")),
                    ("Seed", metrics.get("seed")),
                    ("Fidelity", metrics.get("fidelity")),
                    ("Time", minutes),
                    ("Code", tag("code", metrics.get("code_version"))),
                    ("Settings", tag("code", metrics.get("config_hash"))),
                    ("Data", tag("code", str(metrics.get("data_checksum"))[:16])),
                    ("Trained with", joined(_checksum(name, state) for name, state in inputs.items())),
                    ("Accepted changes", accepted),
                    ("Python", last.get("python")),
                    ("System", last.get("system")),
                    ("Devices", last.get("devices")),
                    ("Packages", packages),
                ]
            ),
            tag("p", "To train again:") if last.get("command") else "",
            _shown(last["command"]) if last.get("command") else "",
            tag("p", "To score again:") if run.settings else "",
            _shown(command("evaluate", f"--run={run.folder}")) if run.settings else "",
        )
    )


def _shown(words: str) -> Markup:
    return tag("pre", tag("code", words), tabindex="0")


def _checksum(name: str, state: str) -> Markup:
    return joined((tag("code", f"{name} {state[:8]}"), " "))


def _differing(runs: Sequence[Facts]) -> Markup:
    every = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for one in every for key in one)
    rows = [
        [key, *(one.get(key, "-") for one in every)]
        for key in keys
        if len({one.get(key) for one in every}) > 1
    ]
    if not rows:
        return tag("p", "None.")
    return table(("setting", *(joined((signed(run), " ", run.name)) for run in runs)), rows, "Settings")


def _protocols(runs: Sequence[Facts]) -> Markup:
    rows = []
    for name, task, scored in cases(runs):
        ids: dict[tuple[str, str], list[str]] = {}
        for run, entry in scored:
            every = entry.get("protocols") or {entry["primary"]: entry.get("protocol")}
            for score, protocol in every.items():
                ids.setdefault((score, protocol), []).append(run.sign)
        for (score, protocol), signs in ids.items():
            whose = [" ".join(signs)] if len(runs) > 1 else []
            rows.append([name, task, score, f"`{protocol}`", *whose])
    head = ("set", "task", "score", "protocol", *(["runs"] if len(runs) > 1 else []))
    return table(head, rows, "Protocols")
