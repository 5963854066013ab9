"""A double of the IoT Edge runtime as a module sees it, with faults on command.

    runtime.py    the whole runtime on a thread: start, stop, environment, recorded messages
    workload.py   the workload API on a unix socket: sign, trust-bundle
    account.py    the module's names and key, received messages, and faults (`Faults`)
    broker.py     edgeHub's MQTT 3.1.1 over TLS: authentication, telemetry, twin, methods, inputs
    connection.py one client's connection, with faults
    session.py    the session of a client: subscriptions and waiting messages
    twin.py       the twin and edgeHub's rules for reported properties
    packets.py    the packets of MQTT 3.1.1, as far as clients use them
    contract.py   checks of the documents of messages, key by key
    fixtures.py   a runtime and a driven module for tests
    driver.py     a module process under remote control, with the real SDK (for tests)

In a terminal: ``PYTHONPATH=tests/doubles python -m edge_runtime``.
"""
