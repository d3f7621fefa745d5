"""Text generation through llama.cpp and OpenAI-compatible servers."""
