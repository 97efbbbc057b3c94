"""Whether this machine computes what the package needs: `doctor`, which an NPU's owner runs first."""
