"""Sweeps: one experiment with several values of some settings, as experiment files.  Imports no MindSpore."""
