"""Public benchmarks, read from a file of the user, as dialogues and checks of the exam."""
