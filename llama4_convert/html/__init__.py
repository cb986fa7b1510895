"""The report of `validate` as one HTML file, from its JSON alone."""
