"""The command line: words are checked, and mistakes told in sentences, before Hydra sees them."""
