"""The method itself: pure functions over records. No input or output, no torch, no llama.cpp."""
