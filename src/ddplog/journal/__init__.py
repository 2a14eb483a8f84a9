"""The crash-safe hop out of the training process: job folders, journal segments, their writer and reader."""
