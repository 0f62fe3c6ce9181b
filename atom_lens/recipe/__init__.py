"""What a study depends on, as one YAML file: its sections, its activations and their split."""
