"""PEFT LoRA adapters: settings, weights, and what they add to a matrix."""
