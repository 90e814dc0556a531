"""The notebook explorer: linked views of a report, and measurement of typed prompts."""
