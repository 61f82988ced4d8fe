"""What there is: runs and sweeps in the outputs folder and in an MLflow store, listed, shown, compared and cleaned up."""
