"""``python -m worker.health``: the command of a container's health check; see `worker.runtime.health`."""

from worker.runtime.health import main

if __name__ == "__main__":
    raise SystemExit(main())
