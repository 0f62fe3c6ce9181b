"""Publishing atoms, writing their model card, and converting them for other libraries."""
