"""Report: one HTML file about runs and studies, with an atoms browser; it needs no network."""
