"""Training on cached tensors: batches, loss, optimizer, the loop, and what a run leaves."""
