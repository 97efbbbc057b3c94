"""The store itself: entries on disk, how they are addressed, written, read, and kept from the collector."""
