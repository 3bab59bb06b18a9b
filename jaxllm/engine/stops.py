"""Stop strings, matched character by character as text arrives."""

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string met in a text that was fed."""

    stop: str
    end: int
    """Characters of the fed text up to the match's end."""


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Of two that end at the same character the longer wins. Each stop string has a Knuth-Morris-Pratt
    automaton, so a character costs the same whatever came before, and the number of characters that may yet
    turn out to begin a stop string (`partial`) is known exactly, rather than bounded by the longest stop
    string's length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)

    @property
    def partial(self) -> int:
        """Characters at the end of the text so far that are the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str, *, ignore: bool = False) -> StopMatch | None:
        """Reads on by `text`, up to the end of the first match.

        Args:
            text: what follows the text fed before.
            ignore: whether stop strings that end in `text` do not count.
        """
        for position, character in enumerate(text):
            met = self._step(character)
            if met is not None and not ignore:
                return StopMatch(met, position + 1)
        return None

    def _step(self, character: str) -> str | None:
        met = None
        for i, stop in enumerate(self._stops):
            borders, matched = self._borders[i], self._matched[i]
            while matched and stop[matched] != character:
                matched = borders[matched]
            matched += stop[matched] == character
            if matched == len(stop):
                met = met or stop
                matched = borders[matched]
            self._matched[i] = matched
        return met


def _borders(pattern: str) -> list[int]:
    """For each prefix length, the length of its longest proper border (a prefix that is also its suffix)."""
    borders = [0] * (len(pattern) + 1)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length]
        length += pattern[i] == pattern[length]
        borders[i + 1] = length
    return borders
