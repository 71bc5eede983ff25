"""Plans which draws of the global order share a row.

A plan looks at windows of consecutive draws and fills rows by first fit, largest draw first, under
three quotas at once (tokens, image slots, answer tokens). It reads sizes alone, in order, so the
rows are a function of the order of draws, whoever asks for which row.
"""

import collections
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# At the end of a window, rows less full than this may hand their draws on, as far as they are at
# most this share.
FULL = 0.9
CARRY = 0.25
ENDLESS = 1 << 60  # rows


def first_fit(sizes: np.ndarray, capacity: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """Puts each item into the first row with space for it, or into a new row if there is none.

    sizes int [N, 3], capacity int [3]; items are taken in `order`, and every item fits an empty
    row. Returns int [N]: the row of each item.
    """
    free = np.empty((3, len(sizes)), np.int64)  # by quota: comparing is the whole cost
    columns = sizes[:, :, None]  # [N, 3, 1]
    row_of = np.empty(len(sizes), np.int64)
    used = 0
    for item in order:
        fits = (free[:, :used] >= columns[item]).all(axis=0)  # [rows]
        row = int(fits.argmax()) if used else 0
        if not used or not fits[row]:
            row, used = used, used + 1
            free[:, row] = capacity
        free[:, row] -= sizes[item]
        row_of[item] = row
    return row_of


class Mark(NamedTuple):
    """Holds the state of a plan between two windows, from which it can go on."""

    rows: int  # planned before
    windows: int  # planned before
    next: int  # draw
    carried: list[int]  # draws that the last window handed on


class PackingPlan:
    """Plans rows of draws 0, 1, 2, ..., each draw in exactly one row.

    `plan[row]` lists the draws of a row.

    The plan grows as far as it is asked, under a lock, and keeps 8 bytes a draw. A row depends on all
    draws before it, so a plan of millions of rows takes minutes; one that goes on at a mark does not.
    """

    def __init__(
        self,
        size: Callable[[int], tuple[int, int, int]],
        capacity: tuple[int, int, int],
        window: int,
        seed: int,
    ):
        """Takes `size(draw)`: its tokens, image slots and answer tokens, each within `capacity`."""
        self._size, self._capacity, self._window, self._seed = size, np.array(capacity), window, seed
        self._lock = threading.Lock()
        self._begin(Mark(0, 0, 0, []))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> list[int]:
        with self._lock:
            if row < self._first:  # before the mark at which this plan went on
                self._begin(Mark(0, 0, 0, []))
            place = row - self._first
            while len(self._ends) <= place + 1:
                self._extend()
            return list(self._draws[self._ends[place] : self._ends[place + 1]])

    def mark(self, row: int) -> Mark:
        """Returns the last mark before a row, and forgets those before it."""
        with self._lock:
            while len(self._marks) > 1 and self._marks[1].rows <= row:
                self._marks.popleft()
            return self._marks[0]

    def go_on(self, mark: Mark) -> None:
        """Plans from a mark on; rows before it are planned only if they are asked for."""
        with self._lock:
            self._begin(mark)

    def _begin(self, mark: Mark) -> None:
        self._first, self._windows, self._next = mark.rows, mark.windows, mark.next
        self._carried = mark.carried
        self._marks = collections.deque([mark])
        self._draws = array("q")  # of all planned rows, one after the other
        self._ends = array("q", [0])  # row first + r holds draws[ends[r]:ends[r + 1]]

    def _extend(self) -> None:
        """Plans one more window: what the last one carried over, and new draws."""
        carried = len(self._carried)
        new = max(self._window - carried, 1)
        draws = [*self._carried, *range(self._next, self._next + new)]
        sizes = np.array([self._size(draw) for draw in draws])
        # What was carried goes first, so that its rows are closed now: no draw waits for more than
        # one window.
        weight = (sizes / np.maximum(self._capacity, 1)).max(axis=1)
        order = np.lexsort((np.arange(len(draws)), -weight, np.arange(len(draws)) >= carried))
        row_of = first_fit(sizes, self._capacity, order)
        rows: list[list[int]] = [[] for _ in range(row_of.max() + 1)]
        for item in order:
            rows[row_of[item]].append(int(item))
        fill = np.array([sizes[row, 0].sum() / self._capacity[0] for row in rows])
        waiting = [
            r for r in np.argsort(fill, kind="stable") if fill[r] < FULL and min(rows[r]) >= carried
        ]
        waiting = waiting[: int(len(rows) * CARRY)]
        kept = [row for r, row in enumerate(rows) if r not in set(waiting)]
        for r in np.random.default_rng([self._seed, self._windows]).permutation(len(kept)):
            self._draws.extend(draws[item] for item in kept[r])
            self._ends.append(len(self._draws))
        self._carried = [draws[item] for r in sorted(waiting) for item in rows[r]]
        self._next += new
        self._windows += 1
        rows_so_far = self._first + len(self._ends) - 1
        self._marks.append(Mark(rows_so_far, self._windows, self._next, self._carried))
