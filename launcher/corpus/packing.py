"""Which lengths share a sequence: best fit, worked out of how many examples there are of each length alone."""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

Lengths = tuple[tuple[int, int], ...]
"""How many examples there are of each length, in tokens: (length, count), the shortest first."""
TOO_LONG = ("refuse", "cut", "drop")
"""What may become of an example that is longer than the sequence."""


class Bins(NamedTuple):
    """Sequences that hold examples of the same lengths."""

    repeats: int
    """How many there are."""
    contents: tuple[tuple[int, int], ...]
    """How many examples of which lengths are in each: (length, number), the longest first."""


def fitted(lengths: Lengths, sequence: int, too_long: str) -> Lengths:
    """Return the lengths of what is read where no example may be longer than a sequence: others are cut or dropped."""
    fitting = {length: count for length, count in lengths if length <= sequence}
    if too_long == "cut" and (cut := longer(lengths, sequence)):
        fitting[sequence] = fitting.get(sequence, 0) + cut
    return tuple(sorted((length, count) for length, count in fitting.items() if length > 0))


def longer(lengths: Lengths, sequence: int) -> int:
    """Return how many examples are longer than a sequence."""
    return sum(count for length, count in lengths if length > sequence)


def best_fit(lengths: Lengths, sequence: int) -> list[Bins]:
    """Return sequences that hold all examples, each as a whole; none is longer than `sequence`.

    The longest come first, and each goes where the least room is left that is enough for it (best fit decreasing, never
    above 11/9 of the fewest sequences plus one: Johnson et al., SIAM J. Comput. 3, 1974). Sequences with the same
    contents are counted, not listed, and examples of one length are placed together: it takes time and memory by the
    number of different lengths, not by that of the examples.
    """
    # By the room that is left; a list's last are filled first.
    open_bins: dict[int, list[Bins]] = defaultdict(list)
    rooms: list[int] = []

    def keep(room: int, bins: Bins) -> None:
        if bins.repeats:
            if not open_bins[room]:
                bisect.insort(rooms, room)
            open_bins[room].append(bins)

    def fill(room: int, bins: Bins, length: int, number: int) -> None:
        keep(room - number * length, Bins(bins.repeats, (*bins.contents, (length, number))))

    for length, count in reversed(lengths):
        assert 0 < length <= sequence, "what is longer was cut or dropped, and nothing is empty"
        left = count
        while left:
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):
                keep(sequence, Bins(left, ()))
                place = bisect.bisect_left(rooms, sequence)
            room = rooms[place]
            bins = open_bins[room].pop()
            if not open_bins[room]:
                del rooms[place]
            # The next of the same length fits best behind the one before it.
            each = min(left, room // length)
            filled = min(bins.repeats, left // each)
            keep(room, Bins(bins.repeats - filled, bins.contents))
            fill(room, Bins(filled, bins.contents), length, each)
            left -= filled * each
    empty = sorted(room for room in rooms)
    return [bins for room in empty for bins in open_bins[room] if bins.contents]


def single(lengths: Lengths) -> list[Bins]:
    """Return sequences that hold one example each."""
    return [Bins(count, ((length, 1),)) for length, count in reversed(lengths)]


def bins_of(lengths: Lengths, sequence: int, *, packing: bool, too_long: str) -> list[Bins]:
    """Return the sequences of a split of examples."""
    fitting = fitted(lengths, sequence, too_long)
    return best_fit(fitting, sequence) if packing else single(fitting)


def total(bins: Sequence[Bins]) -> int:
    """Return how many sequences there are."""
    return sum(each.repeats for each in bins)
