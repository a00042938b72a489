"""How a worker is observed: log lines, metrics, and what switches them on."""
