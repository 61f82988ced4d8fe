"""The command line: what was typed, checked and said in sentences before Hydra sees it."""
