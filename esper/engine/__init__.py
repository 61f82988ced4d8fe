"""The engine: seeds attached to a model grow in any training loop (``esper.engine.attach``)."""
