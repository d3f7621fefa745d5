"""The kinds of constraint: how each is worded, checked and edited."""
