"""Deployment manifests of IoT Edge: read and judged (`lint`), and made (`generate`). Pure but for files."""
