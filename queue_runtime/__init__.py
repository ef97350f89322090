"""One asynchronous API over message queues, with a compiled core."""
