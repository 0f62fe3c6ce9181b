"""Views: one table, one way to draw, and the page that holds both."""
