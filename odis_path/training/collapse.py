"""Watch for signs of collapse while a run trains."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

COLLAPSE_SPREAD = 0.2  # of token_spread and embedding_spread: 1 spread over the sphere, 0 all equal
ENTROPY_SHARES = (0.01, 0.99)  # of log K: below, the targets are single prototypes; above, they say nothing
_CLEAR = 1.25  # a sign is over when its figure is this factor past the threshold: no flutter
_STRETCH = 0.1  # share of the run that a sign has to last before the user hears of it ...
_LONGEST_STRETCH = 2000  # ... but not more steps than this


class CollapseWatch:
    """Tells when a run collapses: once an episode, after the warm-up, when a sign has lasted for a stretch.

    Signs: `token_spread` or `embedding_spread` below COLLAPSE_SPREAD, `teacher_entropy` near 0 or near log K. Runs often dip
    early and recover, so a single low figure is no collapse.
    """

    def __init__(self, total_steps: int, *, warmup_steps: int = 0, prototypes: int = 0) -> None:
        self.stretch = min(_STRETCH * total_steps, _LONGEST_STRETCH)
        self.warmup_steps = warmup_steps
        self.log_k = log(prototypes) if prototypes > 1 else 0.0
        self.since: dict[str, int] = {}  # sign -> step at which it was first seen, of signs that last
        self.warned = False

    def see(self, row: Mapping[str, float]) -> str | None:
        """Look at a row of the log (it holds `step`); returns the line to show, or None."""
        step = int(row["step"])
        if step <= self.warmup_steps:
            return None
        for sign, bad, over in self._signs(row):
            if over:
                self.since.pop(sign, None)
            elif bad or sign in self.since:
                first = self.since.setdefault(sign, step)
                if bad and not self.warned and 0 < self.stretch <= step - first:
                    self.warned = True
                    return f"step {step}: {self._words(sign, row, first)}"
        if self.warned and not self.since:
            self.warned = False
            return f"step {step}: recovered: {self._state(row)}"
        return None

    def _signs(self, row: Mapping[str, float]) -> list[tuple[str, bool, bool]]:
        """List (sign, it shows, it is clearly over) for the figures that are in the row."""
        signs = [
            (key, row[key] < COLLAPSE_SPREAD, row[key] > COLLAPSE_SPREAD * _CLEAR)
            for key in ("token_spread", "embedding_spread")
            if key in row
        ]
        if "teacher_entropy" in row and self.log_k:
            low, high = ENTROPY_SHARES
            share = row["teacher_entropy"] / self.log_k
            signs.append(("entropy_low", share < low, share > low * _CLEAR))
            signs.append(("entropy_high", share > high, 1 - share > (1 - high) * _CLEAR))
        return signs

    def _words(self, sign: str, row: Mapping[str, float], first: int) -> str:
        if sign in ("token_spread", "embedding_spread"):
            meaning = "the embeddings of different tiles are nearly equal"
            now = f"{sign.replace('_', ' ')} {row[sign]:.2f} of 1"
            cure = "a lower optim.lr, or loss.koleo_weight=0.1"
        else:
            now = f"teacher entropy {row['teacher_entropy']:.2f}, log K {self.log_k:.2f}"
            low = sign == "entropy_low"
            meaning = "the teacher sees one prototype in a tile" if low else "the teacher tells no tiles apart"
            cure = f"a {'higher' if low else 'lower'} loss.teacher_temperature, or a lower optim.lr"
        return f"collapse? {meaning} since step {first} ({now}): if it stays so, begin a new run.out with {cure}"

    def _state(self, row: Mapping[str, float]) -> str:
        shown = ("token_spread", "embedding_spread", "teacher_entropy")
        return ", ".join(f"{key.replace('_', ' ')} {row[key]:.2f}" for key in shown if key in row)
