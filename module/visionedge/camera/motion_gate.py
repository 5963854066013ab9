"""The motion gate: detects motion, so that still pictures need not be analysed.

A picture is reduced to 96 cells across and compared with a learnt background. Changes of light are removed
first: brightness and contrast of the whole picture, then changes that are smooth over a quarter of it. A cell
moves if the rest exceeds its usual noise; the picture moves if enough such cells touch. Everything that stays
is learnt in the end, noise and flicker too, so the gate does not stay open without motion.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.types import Picture

_Cells = NDArray[np.float32]

_CELLS_ACROSS = 96
_SMOOTH_CELLS = 31

_LEARN_S = 5.0
_LEARN_MOVING_S = 20.0
_FIRST_NOISE = 1.5
_NOISE_FACTOR = 4.0
_SCENE_CHANGE = 0.5
_HOLD_NS = 2_000_000_000
_MAX_GAP_S = 5.0


@dataclass(frozen=True, slots=True)
class GateSettings:
    """`every_s`: a picture passes at least this often.

    `sensitivity` 0-1: a higher value detects smaller and fainter objects. At 0.5, eight cells that differ by
    ten grey levels are enough; a person of a sixth of the picture's height covers forty.
    """

    every_s: float = 10.0
    sensitivity: float = 0.5

    @property
    def contrast(self) -> float:
        """Grey levels by which a cell must differ, beyond its noise."""
        return 18.0 - 16.0 * self.sensitivity

    @property
    def cells(self) -> int:
        """Number of such cells that must touch."""
        return round(12 - 8 * self.sensitivity)


class MotionGate:
    """The gate of one connection of a camera; call `passes` for each picture in turn."""

    def __init__(self, settings: GateSettings) -> None:
        self._settings = settings
        self._background: _Cells = np.zeros((0, 0), np.float32)
        self._noise: _Cells = np.zeros((1, 1), np.float32)
        self._moving: NDArray[np.bool_] = np.zeros((1, 1), np.bool_)
        self._seen_ns = 0
        self._passed_ns = 0
        self._moved_ns = 0

    def __repr__(self) -> str:
        return f"<MotionGate moving={float(self._moving.mean()):.1%}>"

    def passes(self, picture: Picture, now_ns: int) -> bool:
        """Whether a picture, BGR of any size, should be analysed."""
        if self._moves(_cells(picture), now_ns):
            self._moved_ns = now_ns
        elif now_ns - self._moved_ns >= _HOLD_NS and now_ns - self._passed_ns < self._settings.every_s * 1e9:
            return False
        self._passed_ns = now_ns
        return True

    def _moves(self, cells: _Cells, now_ns: int) -> bool:
        passed_s = min(_MAX_GAP_S, (now_ns - self._seen_ns) / 1e9)
        self._seen_ns = now_ns
        if self._background.shape != cells.shape:
            self._begin(cells)
            return True
        expected = _match_brightness(self._background, cells, ~self._moving)
        change = cells - expected
        change -= cv2.blur(change, (_SMOOTH_CELLS, _SMOOTH_CELLS))
        strength = np.abs(change)
        moving = strength > self._settings.contrast + _NOISE_FACTOR * self._noise
        if float(moving.mean()) > _SCENE_CHANGE:
            self._begin(cells)
            return True
        self._moving = moving
        self._learn(cells, strength, passed_s)
        return _largest_group_cells(moving) >= self._settings.cells

    def _begin(self, cells: _Cells) -> None:
        self._background = cells
        self._noise = np.full(cells.shape, _FIRST_NOISE, np.float32)
        self._moving = np.zeros(cells.shape, np.bool_)

    def _learn(self, cells: _Cells, strength: _Cells, passed_s: float) -> None:
        """Learn background and noise: quickly in still cells, slowly in moving ones."""
        still, moving = (1 - math.exp(-passed_s / time_s) for time_s in (_LEARN_S, _LEARN_MOVING_S))
        rate = np.where(self._moving, np.float32(moving), np.float32(still))
        self._background = self._background + rate * (cells - self._background)
        self._noise += rate * (strength - self._noise)


def _cells(picture: Picture) -> _Cells:
    height, width = picture.shape[:2]
    across = min(_CELLS_ACROSS, width)
    size = (across, max(1, round(height * across / width)))
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.float32)


def _match_brightness(background: _Cells, cells: _Cells, still: NDArray[np.bool_]) -> _Cells:
    """Return the background at the brightness and contrast of the picture, fitted on still cells."""
    if int(still.sum()) < still.size // 4:
        return background
    old, new = background[still], cells[still]
    old_mean, new_mean = float(old.mean()), float(new.mean())
    spread = float(((old - old_mean) ** 2).sum())
    gain = float(((old - old_mean) * (new - new_mean)).sum()) / spread if spread > 0 else 1.0
    gain = min(2.0, max(0.5, gain))
    return np.asarray((background - old_mean) * gain + new_mean, np.float32)


def _largest_group_cells(moving: NDArray[np.bool_]) -> int:
    """Return the size of the largest group of cells that touch each other."""
    count, _, statistics, _ = cv2.connectedComponentsWithStats(moving.astype(np.uint8), connectivity=8)
    return int(statistics[1:, cv2.CC_STAT_AREA].max()) if count > 1 else 0
