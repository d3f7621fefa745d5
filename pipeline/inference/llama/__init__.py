"""llama.cpp objects: a loaded model, and a context with its KV cache."""
