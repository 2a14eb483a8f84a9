"""Starts a training job, learns how it ended, and tells the run."""
