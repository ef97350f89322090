"""``python -m queue_runtime`` is the command ``queue-runtime``."""

from queue_runtime.cli import main

if __name__ == "__main__":
    main()
