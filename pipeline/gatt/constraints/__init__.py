"""The kinds of constraint: wording, check and edit of each."""
