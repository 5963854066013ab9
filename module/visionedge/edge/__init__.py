"""The IoT Edge side: identity, telemetry and the hub. Only this room imports azure-iot-device.

Delivery (asyncio loop) ── Telemetry ──▶ Message ─┬▶ MessagesFile (own thread)
                                                  └▶ HubClient (`hub:*` threads) ──▶ link ──▶ the SDK
                                                         ▲ │
                                                         │ ▼ what waits for its PUBACK
                                                       Spool (own thread) ──▶ spool.db

    changes, packing, billing   which frames are told, how documents fill blocks, what they cost
    shelves, store, spool_file  the spool's state (pure), its SQLite file, which file it is
    ladder, losable             what is done about failures, and calls that may never return
"""
