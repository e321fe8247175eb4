"""The keyring on disk: its formats, its lock, and the durable save. Blocking code, no trio."""
