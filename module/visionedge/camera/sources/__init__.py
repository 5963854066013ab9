"""Where pictures come from: streams, files, folders, devices, HTTP, and why they fail."""
