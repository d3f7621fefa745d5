"""Dialogues: the built-in ones, and loading them from any source."""
