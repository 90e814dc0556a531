"""What the one-file report is made of: its data here, its page, style and script in assets/."""
