"""Views of an Estimate. They choose words and layout, and compute nothing."""
