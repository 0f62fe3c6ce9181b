"""Report: one HTML file about runs and studies, with an atoms browser, that asks nothing of a network."""
