"""IoT Hub: telemetry, twin, direct methods. Only this package imports azure-iot-device."""
