"""Views: one kind of table, one way to draw, and the page with both."""
