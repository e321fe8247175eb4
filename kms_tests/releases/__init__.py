"""What earlier releases wrote. Nobody edits these files: every release has to open all of it."""
