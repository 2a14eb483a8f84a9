"""The run store and the rank log: what is durable at the aggregator, and how it is read back."""
