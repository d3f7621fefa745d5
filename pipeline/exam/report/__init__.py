"""The results of exams as tables and a page."""
