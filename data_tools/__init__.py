"""Command-line tools that make and inspect data sets."""
