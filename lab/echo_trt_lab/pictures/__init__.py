"""What plots, reports and terminals look like: one palette, one style of plots, one page."""
