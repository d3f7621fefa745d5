"""The chat page of `gatt serve` (NiceGUI)."""
