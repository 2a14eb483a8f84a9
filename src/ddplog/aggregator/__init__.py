"""The aggregator: one process per run, which stores what every node ships and answers the control plane."""
