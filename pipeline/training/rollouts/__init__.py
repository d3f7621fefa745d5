"""On-policy training: the model in training answers turns of its own training dialogues."""
