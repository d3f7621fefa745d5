"""llama.cpp's own converter, which benchmarks and slow tests compare with."""

from pipeline.hub.llama_converter import llama_cpp_sources as converter

__all__ = ["converter"]
