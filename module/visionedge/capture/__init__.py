"""A camera: open, decode, stamp, reconnect; decoded pictures come to the model's input size in one step."""
