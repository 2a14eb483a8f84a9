"""The data plane: keys, sockets and messages between node agents and the aggregator. The only owner of zmq."""
