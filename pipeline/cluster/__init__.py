"""Spread the work of a stage over the machines of a Ray cluster."""
