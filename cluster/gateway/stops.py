"""Stop strings over a stream of text pieces: what may be sent now, what has to wait, where to end."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    The first is the one that is complete first; of several that end at the same character, the longest. So
    the result does not depend on how the text is cut, and no generation is needed past a complete stop
    string. The stop itself is not part of the text. Time per character is O(number of stops), amortised
    (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which would match everywhere."""
        if not all(stops):
            raise ValueError(f"stops has an empty string among {len(stops)}; allowed are strings of 1 character on")
        self._stops = tuple(sorted(set(stops), key=lambda stop: (-len(stop), stop)))
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched_chars = [0] * len(self._stops)
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; returns (text that may be sent, stop string that was met or None).

        Held back is the longest end of the text so far that may be the beginning of a stop string. Once a
        stop was met there is nothing more to send, whatever is pushed.
        """
        if self._found is not None:
            return "", self._found
        seen = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._found = self._advance(char)
            if self._found is not None:
                self._held = ""
                return seen[: position - len(self._found)], self._found
        sendable = len(seen) - max(self._matched_chars, default=0)
        self._held = seen[sendable:]
        return seen[:sendable], None

    def flush(self) -> str:
        """The text held back: it ended before it became a stop string."""
        held, self._held = self._held, ""
        self._matched_chars = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every stop's automaton by one character; the stop that is complete now, the longest first."""
        found = None
        for index, stop in enumerate(self._stops):
            length = self._matched_chars[index]
            while length and stop[length] != char:
                length = self._borders[index][length]
            length += stop[length] == char
            self._matched_chars[index] = length
            if length == len(stop) and found is None:
                found = stop
        return found


def _borders(stop: str) -> list[int]:
    """``borders[n]``: length of the longest proper prefix of ``stop[:n]`` that is also its suffix."""
    borders = [0, 0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length]
        length += stop[length] == char
        borders.append(length)
    return borders
