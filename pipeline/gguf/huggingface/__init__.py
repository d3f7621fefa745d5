"""The files of a Hugging Face folder: configuration, chat template, safetensors, 4-bit weights."""
