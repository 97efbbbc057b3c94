"""The process of a stage: its children, how it is stopped, how it says how far it is."""
