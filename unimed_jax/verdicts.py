"""Writes scores with their intervals, and says in words what they allow."""

from collections.abc import Mapping


def number(value, sign: str = "") -> str:
    """Writes a number with three decimals, None as "-", and any other value as it is."""
    return f"{value:{sign}.3f}" if isinstance(value, float) else "-" if value is None else str(value)


def with_interval(entry: Mapping | None, sign: str = "") -> str:
    """Writes a value with its interval like "0.512 [0.401, 0.623]", or a dash without an entry."""
    if entry is None:
        return "-"
    ends = (
        "no interval" if entry["ci95"] is None else ", ".join(number(end, sign) for end in entry["ci95"])
    )
    return f"{number(entry['value'], sign)} [{ends}]"


def verdict(margin: Mapping | None) -> str:
    """Says what a margin over the best blind baseline allows."""
    if margin is None or margin["ci95"] is None:
        return "no verdict"
    low, high = margin["ci95"]
    return "above blind" if low > 0 else "below blind" if high < 0 else "undecided"


def reliance_verdict(reliance: Mapping | None) -> str:
    """Says what a Visual Reliance Score shows."""
    if reliance is None:
        return "-"
    low, high = reliance["ci95"] or (0, 0)
    return "relies on the image" if low > 0 else "misled by the image" if high < 0 else "undecided"
