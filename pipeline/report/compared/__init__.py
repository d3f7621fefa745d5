"""Several runs side by side: `gatt compare`."""
