"""What mini-kms asks of the operating system: private files, durable writes, a process nobody can look into."""
