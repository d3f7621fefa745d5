"""Find a base model and keep it in the form that a stage needs."""
