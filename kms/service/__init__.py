"""What serves a request. It knows no socket: see `kms.server` for what listens."""
