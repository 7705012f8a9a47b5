"""What can run a call: the table of kernels (``devices``), exact attention, the torch ops."""
