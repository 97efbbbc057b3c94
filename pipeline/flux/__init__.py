"""FLUX.1: its components, their configs, files and loading, the arithmetic outside its networks, its counts."""
