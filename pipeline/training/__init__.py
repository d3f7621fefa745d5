"""QLoRA training: examples, loss, trainer, backends."""
