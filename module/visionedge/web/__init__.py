"""The local HTTP side: JSON, live streams, Open Inference Protocol, page. `server.Server` starts it."""
