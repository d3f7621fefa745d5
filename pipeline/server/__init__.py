"""The OpenAI-compatible HTTP server over `inference.async_engine`."""
