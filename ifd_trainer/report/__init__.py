"""Numbers to tables, plots and a page."""
