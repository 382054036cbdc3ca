"""Time and memory of operators, networks, loading and runtimes."""
