"""What the benchmark is made of; the command itself is cumoe/cli/bench.py."""
