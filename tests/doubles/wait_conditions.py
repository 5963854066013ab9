"""Waits of tests."""

from edge_runtime.broker import ReceivedMessage


def at_least(count: int, output: str = "detections") -> "MessageCount":
    """A condition for `wait_for`: so many different messages of an output."""
    return MessageCount(count, output)


class MessageCount:
    def __init__(self, count: int, output: str) -> None:
        self._count = count
        self._output = output

    def __call__(self, messages: list[ReceivedMessage]) -> bool:
        return len({m.message_id for m in messages if m.output == self._output}) >= self._count
