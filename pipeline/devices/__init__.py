"""The device and its dtypes: what differs between an NPU and a CPU, precision policies, and what was measured."""
