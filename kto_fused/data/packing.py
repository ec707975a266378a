"""Packs: whole examples that share one row of a batch, so that little or nothing is padded."""

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the examples of each pack, by best-fit decreasing: the longest example first, each into the fullest pack
    that has room for it. No example is split or left out.

    The number of packs is at most 11/9 of the least possible one, plus 4 (Johnson 1973).

    Args:
        lengths: [N] integers from 1 to ``capacity``, the examples' numbers of tokens.
        capacity: the most tokens of a pack.

    >>> import numpy as np
    >>> from kto_fused.data.packing import pack
    >>> pack(np.array([3, 6, 4, 2]), capacity=8)
    [[1, 3], [2, 0]]
    """
    packs: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # by the room that is left: packs
    rooms: list[int] = []  # the keys of ``waiting``, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            chosen = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[place]
        packs[chosen].append(row)
        left = room - length
        if left:
            if left not in waiting:
                waiting[left] = []
                insort(rooms, left)
            waiting[left].append(chosen)
    return packs
