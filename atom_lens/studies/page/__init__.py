"""The HTML report about runs and studies."""
