"""The page: one HTML file about runs and studies, with figures and an atoms browser, that asks nothing of a network."""

from atom_lens.page.write import write_page

__all__ = ["write_page"]
