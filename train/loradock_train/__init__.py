"""From a YAML to a checkpoint."""
