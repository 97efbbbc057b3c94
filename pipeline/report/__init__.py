"""A run, or several side by side, as one HTML page.  Imports no MindSpore."""
