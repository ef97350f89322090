from datetime import UTC as UTC

# The rest is for other modules of the core, which cimport it.
