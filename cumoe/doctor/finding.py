"""One line of the report."""

from typing import Literal, NamedTuple

Verdict = Literal["ok", "note", "FAIL"]
WIDTH = 12


class Finding(NamedTuple):
    """What a check found; "note" is something to know, "FAIL" something that ought to work here and does not."""

    verdict: Verdict
    subject: str
    text: str
    cure: str = ""  # what to do about it; every line that is not "ok" has one

    def __str__(self) -> str:
        """Return the line, with the cure below it."""
        cure = f"\n{'':<5} {'':<{WIDTH}} cure: {self.cure}" if self.cure else ""
        return f"{self.verdict:<5} {self.subject:<{WIDTH}} {self.text}{cure}"


def one_line(text: object, limit: int = 300) -> str:
    """Return a text without its line breaks, cut where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
