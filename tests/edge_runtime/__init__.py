"""A stand-in for the IoT Edge runtime: what a module sees of it, on this machine, with faults on command.

    runtime.py    the whole, in a thread: start, stop, environment, recorded messages
    workload.py   the workload API on a unix socket: sign, trust-bundle
    broker.py     edgeHub's MQTT 3.1.1 over TLS: authentication, sessions, telemetry, twin
    packets.py    the packets of MQTT 3.1.1, as far as a client sends or expects them
    contract.py   what the public contract asks of a message, checked key by key
    fixtures.py   a runtime and a driven module for tests
    driver.py     a module process under remote control, with the real SDK (for tests)

By hand: ``PYTHONPATH=tests python -m edge_runtime``.
"""
