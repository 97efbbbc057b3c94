"""What is trained: a LoRA on the transformer and on CLIP, or a ControlNet beside the transformer."""
