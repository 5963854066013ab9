"""A stand-in for the IoT Edge runtime: what a module sees of it, on this machine, with faults on command.

    runtime.py    the whole, in a thread: start, stop, environment, recorded messages
    workload.py   the workload API on a unix socket: sign, trust-bundle
    account.py    the module's names and key, what arrived, and what goes wrong (`Faults`)
    broker.py     edgeHub's MQTT 3.1.1 over TLS: authentication, telemetry, twin, methods, inputs
    connection.py one client's connection, with the faults in between
    session.py    what the hub keeps of a client: subscriptions, messages that wait for it
    twin.py       the twin and edgeHub's rules for reported properties
    packets.py    the packets of MQTT 3.1.1, as far as a client sends or expects them
    contract.py   what the public contract asks of a message, checked key by key
    fixtures.py   a runtime and a driven module for tests
    driver.py     a module process under remote control, with the real SDK (for tests)

By hand: ``PYTHONPATH=tests python -m edge_runtime``.
"""
