"""A short chaos run in the suite; the long one is `make chaos`."""

from chaos import QUICK, Chaos


def test_random_faults_lose_no_message_and_keep_the_order() -> None:
    """Stops, resets, refusals, lost sessions, failing signatures and two kills: every number arrives."""
    figures = Chaos(seconds=5, seed=20, kill_every_s=4, kinds=QUICK).run()

    assert figures["broken"] == []
    assert figures["kills"] >= 2
    assert figures["messages"]["detections"] >= 5
