"""A batch as Redis holds it: its plan, its items, and what it came to."""
