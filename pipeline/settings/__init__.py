"""What an experiment can say: its settings with their rules, and reading them from a file."""
