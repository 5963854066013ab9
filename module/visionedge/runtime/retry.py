"""How long to wait before the next attempt of something that failed: the one definition of a back-off.

A `RetryPolicy` is the wait after so many failed attempts. State machines ask it for the next wait, themselves
or through a `Backoff` that counts for them; a loop of tenacity takes it as its `wait`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import tenacity

_ANY_LOOP = tenacity.Retrying()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Waits between attempts, in seconds: `first_wait_s`, doubled after each failure, `max_wait_s` at most.

    `jitter` (0 to 1) is the share by which a wait may be shortened at random, so that many devices that lost
    the same server do not return in the same moment.
    """

    first_wait_s: float
    max_wait_s: float
    jitter: float = 0.0

    def wait_s(self, failed_attempts: int, random_fraction: Callable[[], float] = random.random) -> float:
        """The wait after so many failed attempts, in s; none after 0 of them."""
        if failed_attempts == 0:
            return 0.0
        state = tenacity.RetryCallState(_ANY_LOOP, None, (), {})
        state.attempt_number = failed_attempts
        longest_s = tenacity.wait_exponential(self.first_wait_s, self.max_wait_s)(state)
        return longest_s * (1 - self.jitter * random_fraction())

    def __call__(self, state: tenacity.RetryCallState) -> float:
        """The same for a loop of tenacity."""
        return self.wait_s(state.attempt_number)


class Backoff:
    """Counts the failed attempts of one thing for its `RetryPolicy`."""

    def __init__(self, policy: RetryPolicy, random_fraction: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._random_fraction = random_fraction
        self._failed_attempts = 0

    def __repr__(self) -> str:
        return f"<Backoff failed_attempts={self._failed_attempts}>"

    def next_wait_s(self) -> float:
        """Count a failed attempt and return the wait before the next one, in s."""
        self._failed_attempts += 1
        return self._policy.wait_s(self._failed_attempts, self._random_fraction)

    def reset(self) -> None:
        """Begin with short waits again."""
        self._failed_attempts = 0
