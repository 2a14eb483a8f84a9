"""The forwarder: a process per sink that delivers the store's emissions by cursor."""
