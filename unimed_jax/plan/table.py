"""Turns what was compiled into the rows of plan.json, a table for the terminal and a page.

Bytes, FLOPs and times are those of one device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax import files
from unimed_jax.bounds import FrozenDict
from unimed_jax.config import Config, config_hash
from unimed_jax.model.grouped import SHOWN
from unimed_jax.plan.compile import Outcome, versions
from unimed_jax.plan.roofline import costs, outlook, times
from unimed_jax.plan.topology import Topology
from unimed_jax.provenance import code_version

Row = dict[str, Any]

SCHEMA = 1
KINDS = ("frozen", "trained", "optimizer", "batch", "cache", "activations", "temporaries")
FILES = ("plan.json", "plan.md")


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def row_of(outcome: Outcome, prices: Mapping[str, float] = FrozenDict()) -> Row:
    """Says whether a program fits, and what it costs, as a row of plan.json; bytes of memory are GiB.

    prices: of an hour of a chip, by its name.
    """
    row = _memory(outcome)
    job, program = outcome.job, outcome.text
    row["notes"] = _notes(outcome)
    if not program:
        return row
    sizes = outcome.result["sizes"]
    row["cost"] = cost = costs(job.config, row["mesh"], job.program, program, sizes)
    amounts = (cost[name]["compiled"] for name in ("flops", "bytes", "collective_bytes"))
    row["roofline"] = line = times(job.topology, *amounts)
    row["notes"] += _uncounted(job.topology, cost["unknown"])
    if line:
        price = prices.get(chip := job.topology.text.partition(":")[0])
        if prices and price is None and job.program == "train":
            row["notes"].append(
                f"{job.topology.text}: there is no price of {chip}, so none of training."
            )
        row["outlook"] = outlook(job.config, job.topology, job.program, line["step_s"], price, sizes)
    return row


def _notes(outcome: Outcome) -> list[str]:
    """Says in sentences how its experts run, and what it lacks of the program that will run."""
    job, notes = outcome.job, []
    if chosen := outcome.result.get("experts"):
        notes.append(f"{job.topology.text}: {SHOWN[chosen]}.")
    if "memory" in outcome.result and not outcome.result["text"]:
        notes.append(
            f"{job.topology.text}: its compiler keeps no text of the program, so FLOPs, bytes and times "
            "are not known."
        )
    return notes


def _uncounted(topology: Topology, unknown: Sequence[str]) -> list[str]:
    """Says in sentences what a program's times leave out."""
    notes = []
    if unknown:
        names = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        notes.append(
            f"{topology.text}: kernels that could not be counted are left out, and such loops count "
            f"as one turn ({names}), so its times are too low."
        )
    if topology.chip and topology.machines > 1 and not topology.chip.beyond:
        notes.append(
            f"{topology.text}: how fast its machines are joined is not known, so what they send counts "
            "as within one machine, and its times may be too low."
        )
    return notes


def _memory(outcome: Outcome) -> Row:
    """Compares what a program needs of a device's memory with what there is."""
    topology, result = outcome.job.topology, outcome.result
    row: Row = {
        "topology": topology.text,
        "devices": topology.count,
        "program": outcome.job.program,
        "fits": None,
        "reason": outcome.failed,
    }
    if outcome.failed:
        return row
    row |= {"device": result["device"], "mesh": result["mesh"], "seconds": result["seconds"]}
    if outcome.job.program == "train":
        config = outcome.job.config
        row |= {"remat": config.model.remat, "micro_batches": config.train.accumulation}
    kinds = {name: size for name, size in result["arguments"].items() if size}
    given = sum(kinds.values())
    usable, memory = topology.usable, result.get("memory")
    if memory is not None:
        needed = sum(memory.values()) - 2 * memory["alias"]
        # What a program does not read is no argument of it, but lies in the device's memory all the
        # same: the encoder while answers are decoded.
        needed += max(0.0, given - memory["argument"])
        row["fits"] = needed <= usable
    else:
        exceeds = result["exceeds"]
        needed, usable = exceeds.get("needed"), exceeds.get("usable", usable)
        row["fits"] = False
    # What the backward pass reads may be computed again or lie elsewhere: never more than there is.
    rest = result["activations"] if needed is None else max(0.0, needed - given)
    kept = min(result["activations"], rest)
    kinds |= {"activations": kept, "temporaries": rest - kept}
    row["gib_by_kind"] = {name: size / 2**30 for name, size in kinds.items()}
    row["gib_needed"] = None if needed is None else needed / 2**30
    row["gib_usable"] = usable / 2**30
    if not row["fits"]:
        row["reason"] = _too_much(row)
    return row


def _too_much(row: Row) -> str:
    """Says what of a program that does not fit is largest, and which settings make it smaller."""
    largest = max(row["gib_by_kind"], key=row["gib_by_kind"].get)
    if largest in ("frozen", "trained", "optimizer"):
        advice = "split the model over more chips (config.mesh.fsdp or tensor)"
    elif row["program"] != "train":
        advice = "lower config.evaluate.batch, evaluate.max_new_tokens or text.max_prompt"
    else:
        advice = "raise config.train.accumulation, or lower config.data.rows or row_tokens"
        if row["remat"] != "full":
            advice = f"set config.model.remat='full', {advice}"
    needed = "more" if row["gib_needed"] is None else f"{row['gib_needed']:.1f} GiB"
    held = row["gib_by_kind"][largest]
    return (
        f"{row['program']} needs {needed} of the {row['gib_usable']:.1f} GiB of each device of "
        f"{row['topology']}, most of it for {largest} ({held:.1f} GiB); {advice}."
    )


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

MEMORY = ("topology", "program", "mesh", "fits", "GiB of", *KINDS, "compiled in")
COST = (
    *("topology", "program", "mesh", "TFLOP", "x useful", "GB moved", "x ideal", "GB sent", "x ideal"),
    *("step s", "bound", "a second", "hours", "price"),
)


def memory_cells(row: Row) -> list[str]:
    """Writes a row's memory for a table; what is not known is a dash."""
    if "mesh" not in row:
        return [row["topology"], row["program"], "-", "not known", *["-"] * (len(KINDS) + 2)]
    needed = "-" if row["gib_needed"] is None else _gib(row["gib_needed"])
    found = row["gib_by_kind"]
    seconds = row["seconds"].get("compile")
    return [
        row["topology"],
        row["program"],
        layout(row),
        "yes" if row["fits"] else "no",
        f"{needed} of {row['gib_usable']:.2f}",
        *(_gib(found[kind]) if kind in found else "-" for kind in KINDS),
        "-" if seconds is None else f"{seconds:.0f} s",
    ]


def cost_cells(row: Row) -> list[str]:
    """Writes what a device does in one run of a program, and how long that takes at least."""
    cells = [row["topology"], row["program"], layout(row)]
    units = {"flops": 1e12, "bytes": 1e9, "collective_bytes": 1e9}
    for name, unit in units.items():
        found = row["cost"][name]
        cells += [f"{found['compiled'] / unit:.3g}", _number(found["ratio"])]
    line, seen = row["roofline"], row.get("outlook", {})
    rate = next((f"{x:.3g} {name[:-6]}" for name, x in seen.items() if name.endswith("_per_s")), "-")
    cells += [_number(line.get("step_s")), line.get("bound", "-"), rate]
    return cells + [_number(seen.get("hours")), _number(seen.get("cost"))]


def _gib(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def mesh_name(mesh: Mapping[str, int]) -> str:
    """Writes the sizes of a mesh that are not 1, as in "data 4, tensor 4"."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def layout(row: Row) -> str:
    """Writes a row's mesh and, of training, what is computed again and the micro-batches."""
    again = {"none": "", "dots": ", remat dots", "full": ", remat full"}[row.get("remat", "none")]
    micro = row.get("micro_batches", 1)
    return mesh_name(row["mesh"]) + again + (f", {micro} micro-batches" if micro > 1 else "")


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Writes a table for a terminal, its columns padded to the same width."""
    table = [list(head), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Makes the tables of memory and of cost, (head, lines), without columns that hold nothing."""
    made: list[tuple[Sequence[str], list[list[str]]]] = [(MEMORY, [memory_cells(row) for row in rows])]
    made.append((COST, [cost_cells(row) for row in rows if "cost" in row]))
    found = []
    for head, lines in made:
        used = [i for i, _ in enumerate(head) if any(line[i] != "-" for line in lines)]
        if lines:
            found.append(([head[i] for i in used], [[line[i] for i in used] for line in lines]))
    return found


def text(rows: Sequence[Row]) -> str:
    """Writes the rows for the terminal: the tables, and a sentence for each that does not fit."""
    return "\n\n".join([*(aligned(*table) for table in tables(rows)), *sentences(rows)])


def sentences(rows: Sequence[Row]) -> list[str]:
    """Lists why rows do not fit or are not known, and what to mind about them, each once."""
    found = [row["reason"] for row in rows if row["reason"]]
    return list(dict.fromkeys([*found, *(note for row in rows for note in row["notes"])]))


def write(folder: Path, config: Config, rows: Sequence[Row], source: str) -> None:
    """Writes plan.json and plan.md into a folder; `source` is the config file as it was named."""
    from unimed_jax.evaluate.report.markdown import markdown_table

    about = {"config": source, "config_hash": config_hash(config), "code": code_version()}
    content = {"schema": SCHEMA, **about, "versions": versions(), "rows": list(rows)}
    page = [
        f"# Plan of {config.name}",
        f"{source}, settings {about['config_hash']}, code {about['code']}. Of one device, and of "
        "one run of a program; compiled, not run.",
        *(markdown_table(*table) for table in tables(rows)),
        *sentences(rows),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_together(folder, FILES) as temporary:
        files.write_json(temporary / "plan.json", content)
        files.write_text(temporary / "plan.md", "\n\n".join(page) + "\n")
