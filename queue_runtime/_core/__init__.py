"""The compiled core. Its modules know no provider and no event-loop policy; README.md here defines the words."""
