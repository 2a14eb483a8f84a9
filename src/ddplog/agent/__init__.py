"""The node agent: tails the journals of the node's ranks and ships them to the aggregator."""
