"""A broker in a process of its own, and the provider that reaches it: for tests and benches, not for users."""
