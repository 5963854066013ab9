"""How far a live source is behind: what it sent long ago and still lies in buffers on the way."""

_DRIFT = 0.0005
_LEAP_S = 10.0


class Backlog:
    """Compares the stream's own times with the clock; only their difference counts, not their zero.

    The shortest way so far is taken for no delay at all. It may lengthen by 0.05 % of the time that passes,
    as clocks of cameras do not run exactly; and a read that had to wait for its packet shows that nothing
    else lies in front of it.
    """

    def __init__(self) -> None:
        self._base_s: float | None = None
        self._sent_s = 0.0
        self._now_s = 0.0
        self._step_s = 0.0

    def __repr__(self) -> str:
        return f"<Backlog base={self._base_s}>"

    def late_s(self, sent_s: float, now_s: float, waited_s: float) -> float:
        """How late a packet is, in s.

        Args:
            sent_s: the stream's time of the packet.
            now_s: the clock when it was read.
            waited_s: how long reading it took.
        """
        way_s = now_s - sent_s
        step_s = sent_s - self._sent_s
        if self._base_s is None or not -1 < step_s < _LEAP_S:
            self._base_s = way_s
        else:
            if step_s > 0:
                self._step_s += (step_s - self._step_s) / 8
            waited = waited_s > max(0.005, self._step_s / 2)
            allowed_s = self._base_s + _DRIFT * (now_s - self._now_s)
            self._base_s = way_s if waited else min(way_s, allowed_s)
        self._sent_s, self._now_s = sent_s, now_s
        return way_s - self._base_s

    def forget(self) -> None:
        """Begin anew: what is late now counts as in time."""
        self._base_s = None
