"""The `gatt` command. A stage and its libraries are imported when the stage is called."""

from pipeline.cli.entry import app, main

__all__ = ["app", "main"]
