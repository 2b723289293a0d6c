"""What `python -m cumoe doctor` finds out; the standard library alone, so that it answers where nothing else can."""
