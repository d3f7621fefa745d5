"""The HTTP server: OpenAI's interface over the engine of `backends.serving`."""
