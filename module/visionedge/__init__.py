"""visionedge: ONNX object detection on camera frames, as an Azure IoT Edge module."""

__version__ = "0.2.0"
