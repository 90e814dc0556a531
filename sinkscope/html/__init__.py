"""Self-contained pages of reports and experiments; style and script are in assets/."""
