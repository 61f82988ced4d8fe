"""Where runs come from that esper did not make: MLflow stores, exports of W&B and trackio, TensorBoard's event files, tables."""
