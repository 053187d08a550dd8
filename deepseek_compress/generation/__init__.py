"""Text from a model, whatever form it has: a checkpoint, a graph, an engine, a folder of another runtime, a server."""
