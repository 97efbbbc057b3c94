"""An experiment resolved on this machine: its photos, what it needs from the store, and its run."""
