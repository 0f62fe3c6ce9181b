"""What a study depends on, as sections of one YAML file."""
