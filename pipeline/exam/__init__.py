"""The persistence exam: a frozen set, arms without training, and a result that others can cite."""
