"""From an adapter to verified GGUF files."""
