"""Finds archives that lie where unpacked data belongs, and says how to unpack them."""

import struct
from pathlib import Path

from unimed_jax.parsing import stand_in

_END = b"PK\5\6"  # begins the record at the end of a zip
_TAIL = 1 << 16  # bytes from the end within which that record begins


def packed(*places: Path) -> str:
    """Says which zip should be unpacked first, as one sentence, or "" if there is none.

    places: folders that are looked into, the first ones first, or a zip itself. A zip over several
    disks (name.zip with name.z01, name.z02 ...) has to be joined first, since hardly any program
    reads it as it is.
    """
    for place in places:
        inner = place.iterdir() if place.is_dir() else place.parent.glob(f"{place.stem}.z*")
        names = sorted(inner)
        disks = [
            path
            for path in names
            if path.suffix[:2] == ".z" and path.suffix[2:].isdigit() and path.is_file()
        ]
        zips = [path for path in names if path.suffix == ".zip" and path.is_file()]
        for path in (*disks, *zips):
            if found := _stand_in(path):
                return f"{path} {found}."
        if disks or zips:
            return _advice(disks, zips[0] if zips else disks[0].with_suffix(".zip"))
    return ""


def _advice(disks: list[Path], last: Path) -> str:
    disks = [path for path in disks if path.stem == last.stem] or disks
    if disks and disks[0].stem != last.stem:
        last = disks[0].with_suffix(".zip")
    count = max([int(path.suffix[2:]) for path in disks], default=0)
    count = max(count, _disks_before(last)) if last.is_file() else count
    there = {int(path.suffix[2:]) for path in disks}
    lacking = [f".z{n:02d}" for n in range(1, count + 1) if n not in there]
    lacking += [".zip"] * (not last.is_file())
    if lacking:
        return (
            f"{last.with_suffix('')} is a zip over several disks that lacks {', '.join(lacking[:5])}; "
            "get all of its files."
        )
    if count:
        return (
            f"{last} is a zip over {count + 1} disks (.z01 to .z{count:02d} and .zip), which is not "
            f"read as it is; join and unpack it: `zip -s 0 {last.name} --out joined.zip`, "
            "`unzip joined.zip`."
        )
    return f"{last} is still packed; unpack it with `unzip {last.name}` and give its folder."


def _stand_in(path: Path) -> str:
    """Says whether a pointer or a web page lies in place of an archive."""
    with path.open("rb") as file:
        return stand_in(file.read(1000))


def _disks_before(path: Path) -> int:
    """Reads from the end of a zip how many disks come before its last one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        tail = file.read()
    at = tail.rfind(_END)
    number = struct.unpack_from("<H", tail, at + 4)[0] if 0 <= at <= len(tail) - 6 else 0
    return number if number != 0xFFFF else 0  # 0xFFFF: a zip64 record says it; .z files do too
