"""The one place that states the version."""

VERSION = "0.1.0"
TOOL = f"llama4-convert {VERSION}"
