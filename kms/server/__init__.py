"""The daemon, on trio."""
