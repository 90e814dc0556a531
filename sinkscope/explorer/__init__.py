"""The notebook explorer: a report with linked views, and prompts typed into it."""
