"""What `python -m cumoe` runs."""
