"""Hyperparameter search by Optuna's ask and tell: spaces in Hydra's syntax, and the study behind searches and tuning."""
