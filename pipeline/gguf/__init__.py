"""GGUF files: read, merge an adapter tensor by tensor, quantize, write."""
