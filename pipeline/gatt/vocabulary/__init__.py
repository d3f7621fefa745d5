"""Open vocabulary: values of constraints, and attributes that are recalled."""
