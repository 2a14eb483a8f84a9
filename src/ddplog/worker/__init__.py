"""What runs inside a training process: a journal, and nothing else. No thread, no socket, no further library."""
