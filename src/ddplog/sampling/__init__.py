"""Reads what the node's GPUs, the host and the ranks' processes do. Owns pynvml and psutil; writes nothing."""
