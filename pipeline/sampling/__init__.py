"""Drawing pictures with what was trained: which are asked for, their latents, decoding, showing."""
