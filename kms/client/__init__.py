"""What programs use to talk to a mini-kms server."""
