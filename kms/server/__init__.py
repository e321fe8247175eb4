"""What listens, supervises and moves bytes, on trio."""
