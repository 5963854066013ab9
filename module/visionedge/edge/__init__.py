"""The IoT Edge side: identity, telemetry and the hub. Only this room imports azure-iot-device.

Delivery (asyncio loop) ── Telemetry ──▶ Message ─┬▶ MessagesFile (own thread)
                                                  └▶ HubClient (`hub:*` threads) ──▶ link ──▶ the SDK
                                                         ▲ │
                                                         │ ▼ what waits for its PUBACK
                                                       Spool (own thread) ──▶ spool.db
Desired, Reported, Methods, Questions (asyncio loop) ◀── what the hub client hears; answers go as errands

    wish, desired, last_good    desired properties: judged (pure), applied one after the other, kept on disk
    reported                    what the hub knows of us, and the patches to it (pure)
    methods, questions          direct methods, and pictures of other modules
    changes, packing, billing   which frames are told, how documents fill blocks, what they cost
    shelves, store, spool_file  the spool's state (pure), its SQLite file, which file it is
    line                        one connection: made, listened to, ended, and the errands over it
    ladder, losable             what is done about failures, and calls that may never return
"""
