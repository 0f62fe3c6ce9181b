"""Publishing atoms with a model card, and converting dictionaries for other libraries."""
