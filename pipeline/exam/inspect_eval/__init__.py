"""The exam as a task of Inspect (`inspect eval gatt/exam`); see README.md."""
