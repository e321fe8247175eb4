"""What is kept on disk: the keyring, with its formats, lock and durable save; the audit log; usage. Blocking, no trio."""
