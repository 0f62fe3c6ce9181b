"""Training: any number of dictionaries in one pass of sae-lens' own trainer."""
