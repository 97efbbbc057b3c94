"""What `python -m cache` does with a store: list, check, compare, explain, export, clean up."""
