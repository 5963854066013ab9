"""The IoT Edge side: identity, telemetry and the hub. Only this room imports azure-iot-device.

Delivery (asyncio loop) ── Telemetry ──▶ Message ─┬▶ MessagesFile (own thread)
                                                  └▶ HubClient (`hub:*` threads) ──▶ link ──▶ the SDK
"""
