"""Runs as their folders tell of them: settings, numbers, how far each came, and what differs.  Imports no MindSpore."""
