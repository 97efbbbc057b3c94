"""What an experiment will take, from configs alone: parameters, bytes, memory, room on the disks."""
