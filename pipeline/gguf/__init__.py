"""GGUF files: read with care, merge an adapter tensor by tensor, write."""
