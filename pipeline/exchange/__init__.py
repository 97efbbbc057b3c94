"""LoRAs in the layouts that other programs read and write.  Imports no MindSpore."""
