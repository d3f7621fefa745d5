"""The parts of an evaluation's numbers, by topic."""
