"""A detector that finds colours."""

import numpy as np

from vpt.branches import BranchError, Proposal

COLORS = {"red": 0, "green": 1, "blue": 2}


class ColorDetector:
    """Finds the largest area of a colour by its channels: "the blue tag"."""

    def __init__(self):
        self.asked = []

    def propose(self, image, phrase):
        self.asked.append(phrase)
        wanted = [COLORS[word] for word in phrase.split() if word in COLORS]
        if not wanted:
            raise BranchError(f"no colour in {phrase!r}")
        pixels = np.asarray(image, dtype=int)
        channel = pixels[..., wanted[0]]
        others = np.delete(pixels, wanted[0], axis=-1).max(-1)
        rows, columns = np.nonzero(channel - others > 60)
        if not len(rows):
            return []
        box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return [Proposal(tuple(map(int, box)), 0.75, phrase)]
