"""What each stage computes: plain functions, no Luigi.  `stages` has the table of them, `commands` the command line.

docs/architecture.md says what lies in which room, and which room may import which.
"""
