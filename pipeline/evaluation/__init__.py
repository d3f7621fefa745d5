"""What is measured, and what the numbers mean."""
